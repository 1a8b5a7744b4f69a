// The few formulas that forward and backward kernels share.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/sigmoid.cuh"
#include "common/cuda/vector.cuh"
#include "norm/cuda/config.h"
#include "norm/params.h"

namespace inlay::norm::cuda {

using inlay::cuda::sigmoid;

template <typename T>
__device__ inline const T* row_of(const RowTensor& tensor, int64_t row) {
  return static_cast<const T*>(tensor.data) + tensor.layout.offset(row);
}

// Brings a block's first rows of a tensor to L2 while the previous kernel ends. The data may still be written: L2 is
// where all accesses meet, so that a prefetch sees nothing and spoils nothing.
template <typename T, typename Params>
__device__ inline void prefetch_row(const RowTensor& tensor, const Params& p, const Shape& shape) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * shape.groups() + threadIdx.x / shape.group;
  if (row >= p.rows) return;
  constexpr int kLanes = inlay::cuda::kPerAccess<T>;
  const T* const source = row_of<T>(tensor, row);
  for (int column = threadIdx.x % shape.group * kLanes; column < p.width; column += shape.group * kLanes) {
    inlay::cuda::prefetch_to_l2(source + column);
  }
}

struct Gate {
  float value;       // act(z)
  float derivative;  // act'(z)
};

template <typename T>
__device__ inline float activate(Activation activation, float z) {
  const float s = sigmoid<T>(z);
  return activation == Activation::silu ? z * s : s;
}

template <typename T>
__device__ inline Gate activate_with_derivative(Activation activation, float z) {
  const float s = sigmoid<T>(z);
  if (activation == Activation::silu) return {z * s, s * (1.0f + z * (1.0f - s))};
  return {s, s * (1.0f - s)};
}

// (u - mean) * rstd. For a 16-bit T in one instruction, whose error for |mean| >> 1 / rstd vanishes in T's rounding.
template <typename T, int N>
__device__ inline void normalise(float mean, float rstd, float (&u)[N]) {
  if constexpr (sizeof(T) == sizeof(float)) {
#pragma unroll
    for (int i = 0; i < N; ++i) u[i] = (u[i] - mean) * rstd;
  } else {
    const float shift = -mean * rstd;
#pragma unroll
    for (int i = 0; i < N; ++i) u[i] = __fmaf_rn(u[i], rstd, shift);
  }
}

// 1/N for a mean, 1 for the sum that l2 takes.
__device__ inline float sum_scale(Kind kind, int64_t width) {
  return kind == Kind::l2 ? 1.0f : 1.0f / static_cast<float>(width);
}

}  // namespace inlay::norm::cuda
