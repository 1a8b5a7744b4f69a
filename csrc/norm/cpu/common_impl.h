// What the forward and backward kernels share.
#pragma once

#include "common/cpu/dispatch.h"
#include "common/cpu/row_access.h"
#include "common/cpu/sweep.h"
#include "common/cpu/vec_math.h"
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

INLAY_INLINE float square_root(float v) { return __builtin_sqrtf(v); }
INLAY_INLINE double square_root(double v) { return __builtin_sqrt(v); }

// vector + offset in full precision, or `absent` everywhere.
template <class Vec>
void widen(const VectorTensor& vector, int64_t width, double offset, double absent, typename Vec::Scalar* out) {
  using Scalar = typename Vec::Scalar;
  if (!vector.data) {
    for (int64_t i = 0; i < width; ++i) out[i] = static_cast<Scalar>(absent);
    return;
  }
  const RowReader<Vec, typename AnyFor<Scalar>::type> reader({vector.data, vector.dtype, {}}, 0);
  const Vec shift = Vec::set(static_cast<Scalar>(offset));
  // Adding an offset of zero would turn -0 into 0.
  sweep<Vec>(width, [&](int64_t i, auto lanes) {
    const Vec v = reader.load(i, lanes);
    Vec::store(out + i, offset == 0 ? v : v + shift, lanes);
  });
}

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
