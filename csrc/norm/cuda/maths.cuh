// The few formulas that forward and backward kernels share.
#pragma once

#include "norm/params.h"

namespace inlay::norm::cuda {

// What a kernel reads beside x. One kernel each, because registers are what limits them.
enum class Role { plain, residual, gated };

struct Gate {
  float value;       // act(z)
  float derivative;  // act'(z)
};

// 1 / (1 + exp(-z)), within 2 ulp; right for infinite z.
__device__ inline float sigmoid(float z) { return __fdividef(1.0f, 1.0f + expf(-z)); }

__device__ inline float activate(Activation activation, float z) {
  const float s = sigmoid(z);
  return activation == Activation::silu ? z * s : s;
}

__device__ inline Gate activate_with_derivative(Activation activation, float z) {
  const float s = sigmoid(z);
  if (activation == Activation::silu) return {z * s, s * (1.0f + z * (1.0f - s))};
  return {s, s * (1.0f - s)};
}

// 1/N for a mean, 1 for the sum that l2 takes.
__device__ inline float sum_scale(Kind kind, int64_t width) {
  return kind == Kind::l2 ? 1.0f : 1.0f / static_cast<float>(width);
}

}  // namespace inlay::norm::cuda
