// What the bindings of attention share: the checks of its inputs.
#pragma once

#include "attention/params.h"
#include "common/token_tensor.h"

namespace inlay::attention {

// The arguments that the ops have in common, in the order of their schemas.
struct Arguments {
  const char* op;
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const OptionalTensor& gate;
  const OptionalTensor& sinks;
  const OptionalTensor& bias;
  const OptionalTensor& mask;
  const OptionalTensor& cu_seqlens_q;
  const OptionalTensor& cu_seqlens_k;
  const OptionalTensor& kv_lengths;
  const OptionalTensor& key_ranges;
  const OptionalTensor& dropout_seed;
  double scale;
  int64_t window_left;
  int64_t window_right;
  double softcap;
  double dropout_p;
  bool allow_tf32;
};

// `q` is the info of arguments.q.
Inputs checked_inputs(const TensorInfo& q, const Arguments& arguments);

// Empty [0] unless wanted.
Tensor empty_if(bool wanted, const int64_t* sizes, int64_t dim, DType dtype, const TensorInfo& reference);

}  // namespace inlay::attention
