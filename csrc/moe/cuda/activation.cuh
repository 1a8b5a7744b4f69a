// What is between an expert's two projections, and its gradient: of one activation, in float32. T is the dtype that it
// is rounded to afterwards: for one of 16 bits exponentials are those of the special function unit.
#pragma once

#include <type_traits>

#include "common/cuda/mma.cuh"
#include "common/cuda/sigmoid.cuh"
#include "moe/params.h"

namespace inlay::moe::cuda {

using namespace inlay::cuda;

struct GateUp {
  float gate, up;
};

// f(v) and its derivative, which the compiler drops where nobody asks for it.
struct ValueAndSlope {
  float value, slope;
};

template <typename T, Activation kActivation>
__device__ __forceinline__ ValueAndSlope activated(float v) {
  if constexpr (kActivation == Activation::silu || kActivation == Activation::gpt_oss) {
    constexpr float kFactor = kActivation == Activation::silu ? 1.0f : 1.702f;
    const float gate = sigmoid<T>(kFactor * v), value = v * gate;
    return {value, fmaf(kFactor * value, 1.0f - gate, gate)};
  } else if constexpr (kActivation == Activation::gelu) {
    const float below = fmaf(0.5f, erff(v * 0.70710678118654752f), 0.5f);
    const float density = sizeof(T) == 2 ? exp2_fast(v * v * -0.72134752044448170f) : expf(-0.5f * (v * v));
    return {v * below, fmaf(v * 0.39894228040143268f, density, below)};
  } else if constexpr (kActivation == Activation::gelu_tanh) {
    // (1 + tanh(u)) / 2 is the sigmoid of 2 u.
    constexpr float kTwoRoots = 1.5957691216057308f, kCubic = 0.044715f;
    const float square = v * v;
    const float below = sigmoid<T>(kTwoRoots * fmaf(v * square, kCubic, v)), value = v * below;
    return {value, fmaf(value * (1.0f - below), kTwoRoots * fmaf(3.0f * kCubic, square, 1.0f), below)};
  } else {
    const float value = v <= 0.0f ? 0.0f : v;  // NaN stays
    if constexpr (kActivation == Activation::relu) return {value, v > 0.0f ? 1.0f : 0.0f};
    return {value * value, value + value};
  }
}

// Within the limits; NaN stays.
__device__ __forceinline__ GateUp limited(const Gating& gating, float gate, float up) {
  const float limit = static_cast<float>(gating.limit);
  return {gate > limit ? limit : gate, up > limit ? limit : up < -limit ? -limit : up};
}

// What activation(gate) is multiplied by.
template <Activation kActivation>
__device__ __forceinline__ float factor_of(float limited_up) {
  return kActivation == Activation::gpt_oss ? limited_up + 1.0f : limited_up;
}

// The activation of one pair; ungated, `up` is ignored.
template <typename T, Activation kActivation>
__device__ __forceinline__ float activate_as(const Gating& gating, float gate, float up) {
  const GateUp within = limited(gating, gate, up);
  const float value = activated<T, kActivation>(within.gate).value;
  return gating.gated ? value * factor_of<kActivation>(within.up) : value;
}

// The same, and the gradients of the pair from the activation's. None flows to what lies beyond a limit; at it, all.
template <typename T, Activation kActivation>
__device__ __forceinline__ float activate_backward_as(const Gating& gating, float gate, float up, float da,
                                                      float& dgate, float& dup) {
  const GateUp within = limited(gating, gate, up);
  const ValueAndSlope f = activated<T, kActivation>(within.gate);
  const float factor = gating.gated ? factor_of<kActivation>(within.up) : 1.0f;
  const float limit = static_cast<float>(gating.limit);
  dgate = gate > limit ? 0.0f : da * f.slope * factor;
  dup = !gating.gated || up > limit || up < -limit ? 0.0f : da * f.value;
  return f.value * factor;
}

// Calls body(integral constant) with the activation as a template argument. It is the same for all of a kernel: outside
// a loop this makes one loop for each, inside it a branch that all threads take alike.
template <typename Body>
__device__ __forceinline__ auto with_activation(Activation activation, Body body) {
  switch (activation) {
    case Activation::gelu:
      return body(std::integral_constant<Activation, Activation::gelu>());
    case Activation::gelu_tanh:
      return body(std::integral_constant<Activation, Activation::gelu_tanh>());
    case Activation::relu:
      return body(std::integral_constant<Activation, Activation::relu>());
    case Activation::relu2:
      return body(std::integral_constant<Activation, Activation::relu2>());
    case Activation::gpt_oss:
      return body(std::integral_constant<Activation, Activation::gpt_oss>());
    default:
      return body(std::integral_constant<Activation, Activation::silu>());
  }
}

template <typename T>
__device__ __forceinline__ float activate(const Gating& gating, float gate, float up) {
  return with_activation(gating.activation,
                         [&](auto kind) { return activate_as<T, decltype(kind)::value>(gating, gate, up); });
}

template <typename T>
__device__ __forceinline__ float activate_backward(const Gating& gating, float gate, float up, float da, float& dgate,
                                                   float& dup) {
  return with_activation(gating.activation, [&](auto kind) {
    return activate_backward_as<T, decltype(kind)::value>(gating, gate, up, da, dgate, dup);
  });
}

}  // namespace inlay::moe::cuda
