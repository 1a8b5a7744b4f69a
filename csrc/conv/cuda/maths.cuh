// The formulas that all kernels share, each in one order of operations: whichever kernel computes a value, its bits are
// the same.
#pragma once

#include "common/cuda/sigmoid.cuh"
#include "common/cuda/vector.cuh"
#include "conv/params.h"

namespace inlay::conv::cuda {

using namespace inlay::cuda;

// sum of weight[k] * input(k), plus the bias; k counts from the oldest tap
template <int kWidth, class Weight, class Input>
__device__ inline float preactivation(Weight weight, Input input, float bias) {
  float z = 0.0f;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) z = __fmaf_rn(weight(k), input(k), z);
  return __fadd_rn(z, bias);
}

// dx of a token: sum of weight[k] * gradient(k), with the gradient of the token width - 1 - k after it
template <int kWidth, class Weight, class Gradient>
__device__ inline float input_gradient(Weight weight, Gradient gradient) {
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) sum = __fmaf_rn(weight(k), gradient(k), sum);
  return sum;
}

// act(z), where the convolution has been rounded as in eager code. Storing rounds the result.
template <typename T, int N>
__device__ inline void activate(Activation activation, bool rounds, float (&z)[N]) {
  if (activation == Activation::none) return;
  if (rounds) round_all<T>(z);
#pragma unroll
  for (int i = 0; i < N; ++i) z[i] = __fmul_rn(z[i], sigmoid<T>(z[i]));
}

// The gradient of z from that of act(z).
template <typename T>
__device__ inline float through_activation(Activation activation, float upstream, float z) {
  if (activation == Activation::none) return upstream;
  const float s = sigmoid<T>(z);
  return __fmul_rn(__fmul_rn(upstream, s), __fmaf_rn(z, __fsub_rn(1.0f, s), 1.0f));
}

// One element of a dtype known at run time.
__device__ inline float load_one(const void* data, DType dtype, int64_t index) {
  float value[1];
  load_as_float(data, dtype, index, value);
  return value[0];
}
__device__ inline void store_one(void* data, DType dtype, int64_t index, float value) {
  const float values[1] = {value};
  store_from_float(data, dtype, index, values);
}

// The input at a position of a sequence, or before it.
__device__ inline float input_at(const Convolution& p, const Sequence& sequence, int64_t batch, int64_t channel,
                                 int64_t position) {
  if (position >= sequence.begin) return load_one(p.x.data, p.dtype, p.x.offset(batch, position, channel));
  if (!p.initial_state.data) return 0.0f;
  const int64_t column = p.state_column(sequence, position);
  return load_one(p.initial_state.data, p.dtype, p.initial_state.offset(sequence.index, channel, column));
}

// The final state's gradient for the input at a position: the sequence's last inputs are its final state.
__device__ inline float final_state_gradient(const BackwardParams& p, const Sequence& sequence, int64_t channel,
                                             int64_t position) {
  const int64_t column = position - (sequence.end - (p.width - 1));
  if (!p.dfinal_state.data || column < 0) return 0.0f;
  return load_one(p.dfinal_state.data, p.dtype, p.dfinal_state.offset(sequence.index, channel, column));
}

}  // namespace inlay::conv::cuda
