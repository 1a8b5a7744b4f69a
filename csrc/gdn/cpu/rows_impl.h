// Between tensors of any dtype and matrices of the kernels' own type.
#pragma once

#include "common/cpu/gemm.h"
#include "common/cpu/token_rows.h"
#include "common/cpu/vec_math.h"
#include "gdn/cpu/kernels.h"

namespace inlay::gdn {
namespace {

using namespace inlay::cpu;

INLAY_INLINE float inverse_root(float v) { return 1 / __builtin_sqrtf(v); }
INLAY_INLINE double inverse_root(double v) { return 1 / __builtin_sqrt(v); }

// Columns [column, column + width) of a state, zeros where there is none.
template <class Vec>
void load_state(const StateTensor& tensor, int64_t sequence, int64_t head, int64_t column, int64_t width,
                int64_t value_dim, int64_t rows, Matrix<typename Vec::Scalar> to) {
  if (!tensor.data) {
    for (int64_t i = 0; i < rows; ++i) fill_zero(to.row(i), round_up(width, Vec::lanes));
    return;
  }
  with_element_type<Vec>(tensor.dtype, [&](auto element) {
    const auto* data =
        static_cast<const typename decltype(element)::type*>(tensor.data) + tensor.offset(sequence, head) + column;
    for (int64_t i = 0; i < rows; ++i) load_row<Vec>(data + i * value_dim, to.row(i), width);
  });
}

template <class Vec>
void store_state(Matrix<typename Vec::Scalar> from, int64_t rows, const StateTensor& tensor, int64_t sequence,
                 int64_t head, int64_t column, int64_t width, int64_t value_dim) {
  with_element_type<Vec>(tensor.dtype, [&](auto element) {
    auto* data = static_cast<typename decltype(element)::type*>(tensor.data) + tensor.offset(sequence, head) + column;
    for (int64_t i = 0; i < rows; ++i) store_row<Vec>(from.row(i), data + i * value_dim, width);
  });
}

// Multiplies the row by 1 / sqrt(sum of squares + eps), which is returned. The row ends in zeros up to whole vectors.
template <class Vec>
INLAY_INLINE typename Vec::Scalar normalise(typename Vec::Scalar* row, int64_t width) {
  using Scalar = typename Vec::Scalar;
  const int64_t padded = round_up(width, Vec::lanes);
  const Scalar factor = inverse_root(dot<Vec>(row, row, padded) + static_cast<Scalar>(kL2Eps));
  for (int64_t j = 0; j < padded; j += Vec::lanes) {
    Vec::store(row + j, Vec::load(row + j, Full{}) * Vec::set(factor), Full{});
  }
  return factor;
}

// From the gradient of y = factor * x, the row normalised, to that of x: factor * (dy - y <y, dy>), in place.
template <class Vec>
INLAY_INLINE void normalise_backward(const typename Vec::Scalar* y, typename Vec::Scalar factor,
                                     typename Vec::Scalar* dy, int64_t width) {
  const int64_t padded = round_up(width, Vec::lanes);
  const Vec along = Vec::set(-dot<Vec>(y, dy, padded));
  for (int64_t j = 0; j < padded; j += Vec::lanes) {
    const Vec across = fma(along, Vec::load(y + j, Full{}), Vec::load(dy + j, Full{}));
    Vec::store(dy + j, across * Vec::set(factor), Full{});
  }
}

// Below this, e^g is zero. Held there, -inf does as a gate, and large numbers cost no digits of the sums.
template <class Scalar>
constexpr Scalar kLeastGate = sizeof(Scalar) == sizeof(double) ? -746 : -104;

// The log decay of one token; NaN stays NaN.
template <class Vec>
INLAY_INLINE typename Vec::Scalar load_gate(const TokenTensor& tensor, int64_t batch, int64_t token, int64_t head) {
  using Scalar = typename Vec::Scalar;
  const Scalar g = load_number<Vec>(tensor, batch, token, head);
  return g < kLeastGate<Scalar> ? kLeastGate<Scalar> : g;
}

}  // namespace
}  // namespace inlay::gdn
