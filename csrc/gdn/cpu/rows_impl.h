// Between tensors of any dtype and matrices of the kernels' own type.
#pragma once

#include "common/cpu/dispatch.h"
#include "common/cpu/gemm.h"
#include "common/cpu/matrix.h"
#include "common/cpu/sweep.h"
#include "common/cpu/vec_math.h"
#include "gdn/cpu/kernels.h"

namespace inlay::gdn {
namespace {

using namespace inlay::cpu;

INLAY_INLINE float inverse_root(float v) { return 1 / __builtin_sqrtf(v); }
INLAY_INLINE double inverse_root(double v) { return 1 / __builtin_sqrt(v); }

template <class Vec, class E>
INLAY_INLINE void load_row(const E* from, typename Vec::Scalar* to, int64_t width) {
  sweep<Vec>(width, [&](int64_t j, auto lanes) { Vec::store(to + j, Vec::load(from + j, lanes), Full{}); });
}

template <class Vec, class E>
INLAY_INLINE void store_row(const typename Vec::Scalar* from, E* to, int64_t width) {
  sweep<Vec>(width, [&](int64_t j, auto lanes) { Vec::store(to + j, Vec::load(from + j, Full{}), lanes); });
}

template <class Scalar>
INLAY_INLINE void fill_zero(Scalar* row, int64_t width) {
  for (int64_t j = 0; j < width; ++j) row[j] = 0;
}

constexpr int64_t kRowsAhead = 8;

// Columns [column, column + width) of `count` tokens of one head, then rows of zeros up to `padded_rows`. Columns
// beyond the width are zero up to whole vectors.
template <class Vec>
void load_tokens(const TokenTensor& tensor, int64_t batch, int64_t token, int64_t head, int64_t column, int64_t width,
                 int64_t count, int64_t padded_rows, Matrix<typename Vec::Scalar> to) {
  with_element_type<Vec>(tensor.dtype, [&](auto element) {
    using Element = typename decltype(element)::type;
    const Element* data = static_cast<const Element*>(tensor.data) + column + tensor.offset(batch, token, head);
    for (int64_t i = 0; i < count; ++i) {
      const Element* row = data + i * tensor.token_stride;
      // Rows may be pages apart, which the processor does not foresee. A hint, harmless beyond the last row.
      for (int64_t j = 0; j < width; j += kLineBytes / static_cast<int64_t>(sizeof(Element))) {
        __builtin_prefetch(row + kRowsAhead * tensor.token_stride + j);
      }
      load_row<Vec>(row, to.row(i), width);
    }
  });
  for (int64_t i = count; i < padded_rows; ++i) fill_zero(to.row(i), round_up(width, Vec::lanes));
}

// A contiguous tensor [B, T, H, D] seen by one head.
struct HeadRows {
  OutputTensor tensor;
  int64_t heads;
  int64_t dim;
  int64_t head;

  INLAY_INLINE int64_t offset(int64_t row) const { return (row * heads + head) * dim; }
};

// The reverse of load_tokens; `row` is the first token's number of all B * T.
template <class Vec>
void store_tokens(Matrix<typename Vec::Scalar> from, int64_t count, const HeadRows& to, int64_t row, int64_t column,
                  int64_t width) {
  with_element_type<Vec>(to.tensor.dtype, [&](auto element) {
    auto* data = static_cast<typename decltype(element)::type*>(to.tensor.data) + column;
    for (int64_t i = 0; i < count; ++i) store_row<Vec>(from.row(i), data + to.offset(row + i), width);
  });
}

// One number of a tensor [B, T, H].
template <class Vec>
INLAY_INLINE typename Vec::Scalar load_number(const TokenTensor& tensor, int64_t batch, int64_t token, int64_t head) {
  typename Vec::Scalar value[Vec::lanes];
  with_element_type<Vec>(tensor.dtype, [&](auto element) {
    const auto* data =
        static_cast<const typename decltype(element)::type*>(tensor.data) + tensor.offset(batch, token, head);
    Vec::store(value, Vec::load(data, Partial{1}), Full{});
  });
  return value[0];
}

template <class Vec>
INLAY_INLINE void store_number(typename Vec::Scalar value, const OutputTensor& tensor, int64_t index) {
  with_element_type<Vec>(tensor.dtype, [&](auto element) {
    Vec::store(static_cast<typename decltype(element)::type*>(tensor.data) + index, Vec::set(value), Partial{1});
  });
}

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

template <class Vec>
INLAY_INLINE typename Vec::Scalar exp_of(typename Vec::Scalar value) {
  typename Vec::Scalar lanes[Vec::lanes];
  Vec::store(lanes, exp(Vec::set(value)), Full{});
  return lanes[0];
}

}  // namespace
}  // namespace inlay::gdn
