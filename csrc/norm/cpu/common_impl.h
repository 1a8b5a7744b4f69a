// What the forward and backward kernels share.
#pragma once

#include "common/cpu/dispatch.h"
#include "common/cpu/row_access.h"
#include "common/cpu/sweep.h"
#include "common/cpu/vec_math.h"
#include "common/cpu/weights.h"
#include "norm/cpu/kernels.h"

namespace inlay::norm {
namespace {

using namespace inlay::cpu;

// Which rows go into the normalisation and out of it. One kernel instance each.
enum class Form { plain, add, gate_before, gate_after };

template <Form form>
struct FormConstant {
  static constexpr Form value = form;
};
template <bool flag>
struct Flag {
  static constexpr bool value = flag;
};

// act(z), given sigmoid(z).
template <class Vec>
INLAY_INLINE Vec activate(Activation activation, Vec z, Vec sigmoid_z) {
  return activation == Activation::silu ? z * sigmoid_z : sigmoid_z;
}

// act'(z), given sigmoid(z).
template <class Vec>
INLAY_INLINE Vec activation_slope(Activation activation, Vec z, Vec sigmoid_z) {
  const Vec one = Vec::set(1);
  const Vec rest = one - sigmoid_z;
  return activation == Activation::silu ? sigmoid_z * fma(z, rest, one) : sigmoid_z * rest;
}

// Calls body(Type<T>{}) with the dtype that all the given tensors have, or with Any where they differ.
template <class Vec, class Body>
INLAY_INLINE void with_element_type(DType dtype, bool uniform, Body body) {
  if constexpr (sizeof(typename Vec::Scalar) == sizeof(float)) {
    if (!uniform) return body(Type<Any>{});
  }
  cpu::with_element_type<Vec>(dtype, body);
}

}  // namespace
}  // namespace inlay::norm
