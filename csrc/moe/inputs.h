// What the bindings of the MoE family share.
#pragma once

#include "common/device.h"
#include "common/token_tensor.h"
#include "moe/params.h"

namespace inlay::moe {

void check_dtype(const TensorInfo& tensor, DType first, DType second);

// An integer tensor of `count` elements, contiguous, on the device of `reference`.
IndexTensor flat_indices(const char* op, const char* name, const Tensor& tensor, int64_t count,
                         const TensorInfo& reference);

// A contiguous tensor of `count` elements in one of two dtypes.
VectorTensor flat_values(const TensorInfo& tensor, int64_t count, DType first, DType second,
                         const TensorInfo& reference);

// Empty [0] unless wanted.
Tensor empty_if(bool wanted, std::initializer_list<int64_t> sizes, DType dtype, const TensorInfo& reference);

struct Scratch {
  Tensor tensor;
  void* data;
};

// Memory for a kernel of so many bytes.
Scratch make_scratch(int64_t bytes, const TensorInfo& reference);

Tensor empty_integers(std::initializer_list<int64_t> sizes, ScalarType dtype, const TensorInfo& reference);

// The arguments that the ops of experts have in common, in the order of their schemas.
struct ExpertArguments {
  const char* op;
  const Tensor& x;
  const OptionalTensor& weights;
  const Tensor& gate_up_proj;
  const Tensor& down_proj;
  const OptionalTensor& gate_up_bias;
  const OptionalTensor& down_bias;
  const OptionalTensor& shared;
  const OptionalTensor& shared_gate;
  int64_t slots;
  int64_t activation;
  bool gated;
  bool interleaved;
  bool transposed;
  double limit;
};

// `x` is the info of arguments.x.
ExpertInputs checked_inputs(const TensorInfo& x, const ExpertArguments& arguments);

}  // namespace inlay::moe
