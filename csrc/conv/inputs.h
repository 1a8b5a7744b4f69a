// What the bindings that convolve share: checks of their inputs.
#pragma once

#include "common/tensor.h"
#include "conv/params.h"

namespace inlay::conv {

const void* data_of(const TensorInfo& tensor);
void check_dim(const TensorInfo& tensor, int64_t dim, const char* shape);
void check_dtype(const TensorInfo& tensor, DType dtype);

template <class Data>
State<Data> state(const TensorInfo& tensor, Data data) {
  return {data, tensor.strides[0], tensor.strides[1], tensor.strides[2]};
}

// [channels, width] or, as a Conv1d module has it, [channels, 1, width]. Sets the width as well.
VectorTensor weight_tensor(const TensorInfo& weight, const TensorInfo& x, int64_t channels, int64_t& width);
Activation activation_from(const char* op, int64_t activation);
// Eager code computes the convolution in the dtype that x and the weight promote to, and rounds it to that.
bool rounds_preactivation(DType x, DType weight);

// Steps of x [B, T, C] or [B, C] on a state [slots, C, L]; without a bias, slot numbers and y. The state is written
// through, so the schema must say that it is.
StepParams checked_step(const TensorInfo& x, const TensorInfo& state, const TensorInfo& weight, int64_t activation);
// As many slots as batch rows, where no numbers say otherwise.
void check_slots(const StepParams& params, const char* op, const char* state, const TensorInfo& x);

}  // namespace inlay::conv
