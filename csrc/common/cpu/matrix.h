// Small dense matrices in a kernel's own scratch memory, and what is done to them besides multiplying (gemm.h).
#pragma once

#include "common/cpu/elements.h"

namespace inlay::cpu {
namespace {

constexpr int64_t kLineBytes = 64;  // of a cache line, and of the widest vector

// Rows of `stride` elements. Made by `MatrixArena`, its rows are aligned to vectors and have room for whole vectors:
// kernels work on widths rounded up to vectors, on zeros there.
template <class Scalar>
struct Matrix {
  Scalar* data;
  int64_t stride;

  INLAY_INLINE Scalar* row(int64_t i) const { return data + i * stride; }
};

// The part of a matrix from some row, or column, on.
template <class Scalar>
INLAY_INLINE Matrix<Scalar> from_row(Matrix<Scalar> matrix, int64_t row) {
  return {matrix.row(row), matrix.stride};
}
template <class Scalar>
INLAY_INLINE Matrix<Scalar> from_column(Matrix<Scalar> matrix, int64_t column) {
  return {matrix.data + column, matrix.stride};
}

INLAY_INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// An odd number of cache lines a row: with an even one, the rows of a column would share few sets of the cache.
template <class Scalar>
constexpr int64_t padded_stride(int64_t width) {
  constexpr int64_t line = kLineBytes / static_cast<int64_t>(sizeof(Scalar));
  return ((width + line - 1) / line | 1) * line;
}

// Hands out matrices of one block of memory, which must be aligned to kLineBytes.
template <class Scalar>
class MatrixArena {
 public:
  explicit MatrixArena(void* memory) : next_(static_cast<Scalar*>(memory)) {}

  Matrix<Scalar> take(int64_t rows, int64_t width) {
    const Matrix<Scalar> matrix{next_, padded_stride<Scalar>(width)};
    next_ += rows * matrix.stride;
    return matrix;
  }
  Scalar* take_row(int64_t width) { return take(1, width).data; }
  static constexpr int64_t elements(int64_t rows, int64_t width) { return rows * padded_stride<Scalar>(width); }

 private:
  Scalar* next_;
};

// Rows [0, rows) of `to` become those of `from` times its factor. The width is a multiple of Vec's lanes.
template <class Vec, class Scalar = typename Vec::Scalar>
INLAY_INLINE void scale_rows(Matrix<Scalar> from, const Scalar* factors, Matrix<Scalar> to, int64_t rows,
                             int64_t width) {
  for (int64_t i = 0; i < rows; ++i) {
    const Vec factor = Vec::set(factors[i]);
    for (int64_t j = 0; j < width; j += Vec::lanes) {
      Vec::store(to.row(i) + j, factor * Vec::load(from.row(i) + j, Full{}), Full{});
    }
  }
}

// The dot product of two rows. The width is a multiple of Vec's lanes.
template <class Vec, class Scalar = typename Vec::Scalar>
INLAY_INLINE Scalar dot(const Scalar* a, const Scalar* b, int64_t width) {
  Vec even = Vec::set(0), odd = Vec::set(0);  // additions to one vector would each wait for the one before
  int64_t j = 0;
  for (; j + 2 * Vec::lanes <= width; j += 2 * Vec::lanes) {
    even = fma(Vec::load(a + j, Full{}), Vec::load(b + j, Full{}), even);
    odd = fma(Vec::load(a + j + Vec::lanes, Full{}), Vec::load(b + j + Vec::lanes, Full{}), odd);
  }
  if (j < width) even = fma(Vec::load(a + j, Full{}), Vec::load(b + j, Full{}), even);
  return sum(even + odd);
}

// to[j][i] = from[i][j] for i < rows, j < columns; the rows of `to` end in zeros up to whole vectors.
template <class Vec, class Scalar = typename Vec::Scalar>
void transpose(Matrix<Scalar> from, Matrix<Scalar> to, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += Vec::lanes) {
    for (int64_t j = 0; j < columns; j += Vec::lanes) {
      Vec block[Vec::lanes];
      for (int64_t r = 0; r < Vec::lanes; ++r) {
        block[r] = i + r < rows ? Vec::load(from.row(i + r) + j, Full{}) : Vec::set(0);
      }
      Vec::transpose(block);
      for (int64_t r = 0; r < Vec::lanes && j + r < columns; ++r) Vec::store(to.row(j + r) + i, block[r], Full{});
    }
  }
}

}  // namespace
}  // namespace inlay::cpu
