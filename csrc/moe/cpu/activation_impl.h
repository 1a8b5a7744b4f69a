// What is between an expert's two projections, on rows in the kernels' own type whose width is a multiple of lanes.
#pragma once

#include <type_traits>

#include "common/cpu/sweep.h"
#include "common/cpu/vec_math.h"
#include "moe/params.h"

namespace inlay::moe {
namespace {

using namespace inlay::cpu;

INLAY_INLINE float erf_of(float v) { return __builtin_erff(v); }
INLAY_INLINE double erf_of(double v) { return __builtin_erf(v); }

template <class Vec>
Vec erf(Vec v) {
  typename Vec::Scalar lanes[Vec::lanes];
  Vec::store(lanes, v, Full{});
  for (auto& lane : lanes) lane = erf_of(lane);
  return Vec::load(lanes, Full{});
}

// Lanes where v > 0 get `positive`, others 0.
template <class Vec>
Vec where_positive(Vec v, Vec positive) {
  typename Vec::Scalar lanes[Vec::lanes], values[Vec::lanes];
  Vec::store(lanes, v, Full{});
  Vec::store(values, positive, Full{});
  for (int64_t i = 0; i < Vec::lanes; ++i) values[i] = lanes[i] > 0 ? values[i] : 0;
  return Vec::load(values, Full{});
}

template <class Vec>
struct ValueAndSlope {
  Vec value;
  Vec slope;
};

// f(v) and its derivative, which the compiler drops where nobody asks for it.
template <Activation kind, class Vec>
INLAY_INLINE ValueAndSlope<Vec> activated(Vec v) {
  using Scalar = typename Vec::Scalar;
  const auto constant = [](double value) { return Vec::set(static_cast<Scalar>(value)); };
  const Vec one = constant(1);
  if constexpr (kind == Activation::silu || kind == Activation::gpt_oss) {
    const Vec factor = constant(kind == Activation::silu ? 1.0 : 1.702);
    const Vec gate = sigmoid(kind == Activation::silu ? v : factor * v);
    const Vec value = v * gate;
    return {value, fma(factor * value, one - gate, gate)};
  } else if constexpr (kind == Activation::gelu) {
    const Vec below = constant(0.5) * (one + erf(v * constant(0.70710678118654752)));
    const Vec density = constant(0.39894228040143268) * exp(constant(-0.5) * (v * v));
    return {v * below, fma(v, density, below)};
  } else if constexpr (kind == Activation::gelu_tanh) {
    const Vec root = constant(0.79788456080286536), cubic = constant(0.044715);
    const Vec square = v * v;
    const Vec t = tanh(root * fma(v * square, cubic, v));
    const Vec below = constant(0.5) * (one + t);
    const Vec inner = root * fma(constant(3) * cubic, square, one);
    return {v * below, fma(constant(0.5) * v * (one - t * t), inner, below)};
  } else if constexpr (kind == Activation::relu) {
    return {max(constant(0), v), where_positive(v, one)};
  } else {
    const Vec value = max(constant(0), v);
    return {value * value, value + value};
  }
}

// Calls body(integral constant) with the activation as a template argument.
template <class Body>
INLAY_INLINE void with_activation(Activation activation, Body body) {
  switch (activation) {
    case Activation::silu:
      return body(std::integral_constant<Activation, Activation::silu>());
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
  }
}

template <class Vec>
struct Limits {
  explicit Limits(const Gating& gating)
      : high(Vec::set(static_cast<typename Vec::Scalar>(gating.limit))), low(-high), any(gating.limit < kInfinity) {}

  INLAY_INLINE Vec gate(Vec v) const { return any ? min(high, v) : v; }
  INLAY_INLINE Vec up(Vec v) const { return any ? max(low, min(high, v)) : v; }

  static constexpr double kInfinity = __builtin_inf();
  Vec high, low;
  bool any;
};

// The summand of up: gpt_oss multiplies by up + 1.
template <Activation kind>
constexpr int up_offset() {
  return kind == Activation::gpt_oss ? 1 : 0;
}

// out = the activations of `width` pairs of gate and up; out may be either of them.
template <class Vec, class Scalar = typename Vec::Scalar>
void activate(const Gating& gating, const Scalar* gate, const Scalar* up, Scalar* out, int64_t width) {
  const Limits<Vec> limits(gating);
  with_activation(gating.activation, [&](auto kind) {
    constexpr Activation activation = decltype(kind)::value;
    for (int64_t j = 0; j < width; j += Vec::lanes) {
      Vec value = activated<activation>(limits.gate(Vec::load(gate + j, Full{}))).value;
      if (gating.gated) {
        const Vec factor = limits.up(Vec::load(up + j, Full{}));
        value = value * (up_offset<activation>() ? factor + Vec::set(1) : factor);
      }
      Vec::store(out + j, value, Full{});
    }
  });
}

// From the gradients of `width` activations, in `slope`: gate and up become their own gradients, slope the activations.
template <class Vec, class Scalar = typename Vec::Scalar>
void activate_backward(const Gating& gating, Scalar* gate, Scalar* up, Scalar* slope, int64_t width) {
  const Limits<Vec> limits(gating);
  const Scalar limit = static_cast<Scalar>(gating.limit);
  with_activation(gating.activation, [&](auto kind) {
    constexpr Activation activation = decltype(kind)::value;
    for (int64_t j = 0; j < width; j += Vec::lanes) {
      const Vec raw_gate = Vec::load(gate + j, Full{}), da = Vec::load(slope + j, Full{});
      const ValueAndSlope<Vec> f = activated<activation>(limits.gate(raw_gate));
      Vec dgate = da * f.slope, value = f.value;
      Scalar gates[Vec::lanes], ups[Vec::lanes], slopes[Vec::lanes];
      if (gating.gated) {
        const Vec raw_up = Vec::load(up + j, Full{});
        const Vec limited = limits.up(raw_up);
        const Vec factor = up_offset<activation>() ? limited + Vec::set(1) : limited;
        Vec::store(up + j, da * f.value, Full{});
        if (limits.any) {  // none flows to what lies beyond a limit
          Vec::store(ups, raw_up, Full{});
          for (int64_t i = 0; i < Vec::lanes; ++i) up[j + i] = ups[i] > limit || ups[i] < -limit ? 0 : up[j + i];
        }
        dgate = dgate * factor;
        value = value * factor;
      }
      if (limits.any) {
        Vec::store(gates, raw_gate, Full{});
        Vec::store(slopes, dgate, Full{});
        for (int64_t i = 0; i < Vec::lanes; ++i) slopes[i] = gates[i] > limit ? 0 : slopes[i];
        dgate = Vec::load(slopes, Full{});
      }
      Vec::store(gate + j, dgate, Full{});
      Vec::store(slope + j, value, Full{});
    }
  });
}

}  // namespace
}  // namespace inlay::moe
