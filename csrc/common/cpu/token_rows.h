// Between tensors [B, T, H, ...] of any dtype and matrices of the kernels' own type.
#pragma once

#include "common/cpu/dispatch.h"
#include "common/cpu/matrix.h"
#include "common/cpu/sweep.h"
#include "common/cpu/vec_math.h"
#include "common/sequences.h"

namespace inlay::cpu {
namespace {

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
INLAY_INLINE typename Vec::Scalar load_element(const VectorTensor& tensor, int64_t index) {
  typename Vec::Scalar value[Vec::lanes];
  with_element_type<Vec>(tensor.dtype, [&](auto element) {
    const auto* data = static_cast<const typename decltype(element)::type*>(tensor.data) + index;
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

// e^value by the vectors' own function.
template <class Vec>
INLAY_INLINE typename Vec::Scalar exp_of(typename Vec::Scalar value) {
  typename Vec::Scalar lanes[Vec::lanes];
  Vec::store(lanes, exp(Vec::set(value)), Full{});
  return lanes[0];
}

}  // namespace
}  // namespace inlay::cpu
