// Products of an expert's matrix with the values of some of its rows: the matrix is read in place, whichever way round
// it is stored, and rows are on the vectors' lanes.
//
// Two ways, which give the same bits: a tile of many rows, for which pieces of the matrix are widened once and then
// meet all of them (common/cpu/gemm.h); and a few rows, for which the matrix passes by once, as fast as memory gives
// it. Either way an element is a chain of multiply-adds over the inner dimension from 0 upwards, so what a token gets
// does not depend on how many others there are.
#pragma once

#include <type_traits>

#include "common/cpu/gemm.h"
#include "common/cpu/token_rows.h"
#include "moe/cpu/kernels.h"

namespace inlay::moe {
namespace {

using namespace inlay::cpu;

INLAY_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int64_t kFewRows = 4;

// Elements [feature, depth] of one expert's matrix.
struct Weights {
  const void* data;
  DType dtype;
  int64_t stride;      // of stored rows
  bool depth_is_rows;  // stored [depth, features], else [features, depth]

  INLAY_INLINE Weights from_feature(int64_t feature) const {
    const int64_t offset = depth_is_rows ? feature : feature * stride;
    return {static_cast<const char*>(data) + offset * size_of(dtype), dtype, stride, depth_is_rows};
  }
};

INLAY_INLINE Weights weights_of(const ExpertMatrices& matrices, int64_t expert, bool depth_is_rows) {
  return {static_cast<const char*>(matrices.data) + expert * matrices.expert_stride * size_of(matrices.dtype),
          matrices.dtype, matrices.row_stride, depth_is_rows};
}

// to = the first `rows` rows of `columns` elements, widened.
template <class Vec, class E, class Scalar = typename Vec::Scalar>
INLAY_INLINE void load_block(const E* from, int64_t stride, int64_t rows, int64_t columns, Matrix<Scalar> to) {
  constexpr int64_t kAhead = 3;
  for (int64_t i = 0; i < rows; ++i) {
    const E* row = from + i * stride;
    // Rows are pages apart, which the processor does not foresee. A hint, harmless beyond the last row.
    for (int64_t j = 0; j < columns; j += kLineBytes / static_cast<int64_t>(sizeof(E))) {
      __builtin_prefetch(row + kAhead * stride + j);
    }
    load_row<Vec>(row, to.row(i), columns);
  }
}

// c = weights * b for `features` features and `rows` rows, which are columns here, a multiple of lanes.
// `tile` has room for kTileFeatures * kTileDepth elements, either way round.
template <class Vec, class Scalar = typename Vec::Scalar>
void multiply_tile(const Weights& weights, int64_t features, int64_t depth, Matrix<Scalar> b, int64_t rows,
                   Matrix<Scalar> c, Scalar* tile) {
  with_element_type<Vec>(weights.dtype, [&](auto element) {
    const auto* data = static_cast<const typename decltype(element)::type*>(weights.data);
    for (int64_t f = 0; f < features; f += kTileFeatures) {
      const int64_t m = smaller(kTileFeatures, features - f);
      for (int64_t d = 0; d < depth; d += kTileDepth) {
        const int64_t k = smaller(kTileDepth, depth - d);
        const Matrix<Scalar> a{tile, padded_stride<Scalar>(weights.depth_is_rows ? m : k)};
        GemmOperands<Scalar> product{m, rows, k, a, from_row(b, d), from_row(c, f)};
        product.c_factor = d > 0 ? 1 : 0;
        if (weights.depth_is_rows) {
          load_block<Vec>(data + d * weights.stride + f, weights.stride, k, m, a);
          multiply_transposed<Vec>(product);
        } else {
          load_block<Vec>(data + f * weights.stride + d, weights.stride, m, k, a);
          multiply<Vec>(product);
        }
      }
    }
  });
}

template <class Scalar>
constexpr int64_t tile_elements() {
  const int64_t upright = kTileFeatures * padded_stride<Scalar>(kTileDepth);
  const int64_t lying = kTileDepth * padded_stride<Scalar>(kTileFeatures);
  return upright > lying ? upright : lying;
}

// sums[r] += block^T x[r], for lanes features, which are the block's rows, and `count` elements of their depth.
template <class Vec, int64_t rows, class Scalar = typename Vec::Scalar>
INLAY_INLINE void add_block(Vec (&block)[Vec::lanes], Matrix<Scalar> x, int64_t d, int64_t count, Vec (&sums)[rows]) {
  Vec::transpose(block);
  if (count == Vec::lanes) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < Vec::lanes; ++i) {
#pragma GCC unroll 4
      for (int64_t r = 0; r < rows; ++r) sums[r] = fma(block[i], Vec::set(x.row(r)[d + i]), sums[r]);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t r = 0; r < rows; ++r) sums[r] = fma(block[i], Vec::set(x.row(r)[d + i]), sums[r]);
    }
  }
}

// Features [f, f + lanes), of which `features` are there, at depth [d, d + count).
template <class Vec, class E>
INLAY_INLINE void load_features(const E* data, int64_t stride, int64_t features, int64_t count,
                                Vec (&block)[Vec::lanes]) {
  for (int64_t i = 0; i < Vec::lanes; ++i) {
    block[i] = i >= features         ? Vec::set(0)
               : count == Vec::lanes ? Vec::load(data + i * stride, Full{})
                                     : Vec::load(data + i * stride, Partial{count});
  }
}

// y[r][f] for `rows` rows of x, both a row's elements side by side. Blocks of the matrix are turned round in registers.
template <class Vec, int64_t rows, class E, class Scalar = typename Vec::Scalar>
void multiply_rows_across(const E* data, int64_t stride, int64_t features, int64_t depth, Matrix<Scalar> x,
                          Matrix<Scalar> y) {
  constexpr int64_t lanes = Vec::lanes;
  constexpr int64_t kBlocks = 2;  // chains of additions that need not wait for each other
  // All that a line of the cache holds of a feature at once: rows of matrices lie so far apart that their lines push
  // each other out.
  constexpr int64_t kLine = larger_of(kLineBytes / static_cast<int64_t>(sizeof(E)), lanes);
  constexpr int64_t kAhead = 4 * kLine;
  int64_t f = 0;
  for (; f + kBlocks * lanes <= features; f += kBlocks * lanes) {
    Vec sums[kBlocks][rows];
    for (auto& block : sums) {
      for (Vec& row : block) row = Vec::set(0);
    }
    int64_t d = 0;
    for (; d + kLine <= depth; d += kLine) {
#pragma GCC unroll 2
      for (int64_t b = 0; b < kBlocks; ++b) {
        const E* from = data + (f + b * lanes) * stride + d;
        for (int64_t i = 0; i < lanes; ++i) __builtin_prefetch(from + i * stride + kAhead);
#pragma GCC unroll 8
        for (int64_t part = 0; part < kLine; part += lanes) {
          Vec block[lanes];
#pragma GCC unroll 16
          for (int64_t i = 0; i < lanes; ++i) block[i] = Vec::load(from + i * stride + part, Full{});
          add_block<Vec, rows>(block, x, d + part, lanes, sums[b]);
        }
      }
    }
    for (; d < depth; d += lanes) {
      const int64_t count = smaller(lanes, depth - d);
      for (int64_t b = 0; b < kBlocks; ++b) {
        Vec block[lanes];
        load_features<Vec>(data + (f + b * lanes) * stride + d, stride, lanes, count, block);
        add_block<Vec, rows>(block, x, d, count, sums[b]);
      }
    }
    for (int64_t b = 0; b < kBlocks; ++b) {
      for (int64_t r = 0; r < rows; ++r) Vec::store(y.row(r) + f + b * lanes, sums[b][r], Full{});
    }
  }
  for (; f < features; f += lanes) {
    Vec sums[rows];
    for (Vec& row : sums) row = Vec::set(0);
    for (int64_t d = 0; d < depth; d += lanes) {
      const int64_t count = smaller(lanes, depth - d);
      Vec block[lanes];
      load_features<Vec>(data + f * stride + d, stride, features - f, count, block);
      add_block<Vec, rows>(block, x, d, count, sums);
    }
    for (int64_t r = 0; r < rows; ++r) Vec::store(y.row(r) + f, sums[r], Full{});
  }
}

template <class Vec, int64_t rows, class E, class Scalar = typename Vec::Scalar>
void multiply_rows_along(const E* data, int64_t stride, int64_t features, int64_t depth, Matrix<Scalar> x,
                         Matrix<Scalar> y) {
  constexpr int64_t lanes = Vec::lanes;
  constexpr int64_t kVectors = 8 / rows;
  constexpr int64_t kAhead = 8;  // stored rows, which are further apart than the processor foresees
  const auto columns = [&](int64_t f, auto part, int64_t vectors) {
    Vec sums[kVectors][rows];
    for (auto& block : sums) {
      for (Vec& row : block) row = Vec::set(0);
    }
    for (int64_t d = 0; d < depth; ++d) {
      const E* row = data + d * stride + f;
      __builtin_prefetch(row + kAhead * stride);
      for (int64_t v = 0; v < kVectors; ++v) {
        if (v >= vectors) break;
        const Vec block = Vec::load(row + v * lanes, part);
        for (int64_t r = 0; r < rows; ++r) sums[v][r] = fma(block, Vec::set(x.row(r)[d]), sums[v][r]);
      }
    }
    for (int64_t v = 0; v < kVectors && v < vectors; ++v) {
      for (int64_t r = 0; r < rows; ++r) Vec::store(y.row(r) + f + v * lanes, sums[v][r], Full{});
    }
  };
  int64_t f = 0;
  for (; f + kVectors * lanes <= features; f += kVectors * lanes) columns(f, Full{}, kVectors);
  for (; f + lanes <= features; f += lanes) columns(f, Full{}, 1);
  if (f < features) columns(f, Partial{features - f}, 1);
}

// y[r][f] = sum over d of weights[f][d] * x[r][d], for 1 to kFewRows rows. Rows of x end in zeros, and those of y have
// room, up to whole vectors. With 3 rows a fourth is worked on, which x and y must have.
template <class Vec, class Scalar = typename Vec::Scalar>
void multiply_rows(const Weights& weights, int64_t features, int64_t depth, Matrix<Scalar> x, int64_t rows,
                   Matrix<Scalar> y) {
  with_element_type<Vec>(weights.dtype, [&](auto element) {
    using E = typename decltype(element)::type;
    const E* data = static_cast<const E*>(weights.data);
    const auto run = [&](auto count) {
      constexpr int64_t n = decltype(count)::value;
      if (weights.depth_is_rows) {
        multiply_rows_along<Vec, n>(data, weights.stride, features, depth, x, y);
      } else {
        multiply_rows_across<Vec, n>(data, weights.stride, features, depth, x, y);
      }
    };
    if (rows == 1) {
      run(std::integral_constant<int64_t, 1>());
    } else if (rows == 2) {
      run(std::integral_constant<int64_t, 2>());
    } else {
      run(std::integral_constant<int64_t, 4>());
    }
  });
}

// Where each row of a tile is in memory: `row(r)` gives its first element.
//
// to[j][r] = row(r)[j] for r < rows, j < width; columns beyond the rows are zero up to whole vectors.
template <class Vec, class Row, class Scalar = typename Vec::Scalar>
void load_transposed(const Row& row, int64_t rows, int64_t width, Matrix<Scalar> to) {
  for (int64_t r = 0; r < rows; r += Vec::lanes) {
    const int64_t count = smaller(Vec::lanes, rows - r);
    for (int64_t j = 0; j < width; j += Vec::lanes) {
      const int64_t columns = smaller(Vec::lanes, width - j);
      Vec block[Vec::lanes];
      for (int64_t i = 0; i < Vec::lanes; ++i) {
        block[i] = i >= count              ? Vec::set(0)
                   : columns == Vec::lanes ? Vec::load(row(r + i) + j, Full{})
                                           : Vec::load(row(r + i) + j, Partial{columns});
      }
      Vec::transpose(block);
      for (int64_t i = 0; i < columns; ++i) Vec::store(to.row(j + i) + r, block[i], Full{});
    }
  }
}

// The reverse: row(r)[j] = from[j][r].
template <class Vec, class Row, class Scalar = typename Vec::Scalar>
void store_transposed(Matrix<Scalar> from, int64_t rows, int64_t width, const Row& row) {
  for (int64_t r = 0; r < rows; r += Vec::lanes) {
    const int64_t count = smaller(Vec::lanes, rows - r);
    for (int64_t j = 0; j < width; j += Vec::lanes) {
      const int64_t columns = smaller(Vec::lanes, width - j);
      Vec block[Vec::lanes];
      for (int64_t i = 0; i < Vec::lanes; ++i) {
        block[i] = i < columns ? Vec::load(from.row(j + i) + r, Full{}) : Vec::set(0);
      }
      Vec::transpose(block);
      for (int64_t i = 0; i < count; ++i) {
        if (columns == Vec::lanes) {
          Vec::store(row(r + i) + j, block[i], Full{});
        } else {
          Vec::store(row(r + i) + j, block[i], Partial{columns});
        }
      }
    }
  }
}

// The numbers of one row of a matrix of biases, or zeros.
template <class Vec, class Scalar = typename Vec::Scalar>
void load_bias(const ExpertMatrices& bias, int64_t expert, int64_t first, int64_t count, Scalar* to) {
  if (!bias.data) return fill_zero(to, round_up(count, Vec::lanes));
  with_element_type<Vec>(bias.dtype, [&](auto element) {
    using E = typename decltype(element)::type;
    load_row<Vec>(static_cast<const E*>(bias.data) + expert * bias.expert_stride + first, to, count);
  });
}

INLAY_INLINE int64_t first_row(const Rows& rows, int64_t expert) { return expert > 0 ? rows.ends[expert - 1] : 0; }

// The weights of rows [first, first + count), up to whole vectors: zeros.
template <class Vec, class Scalar = typename Vec::Scalar>
void load_weights(const VectorTensor& weights, const Rows& rows, int64_t first, int64_t count, Scalar* to) {
  for (int64_t r = 0; r < count; ++r) to[r] = weights.data ? load_element<Vec>(weights, rows.slots[first + r]) : 1;
  for (int64_t r = count; r < round_up(count, Vec::lanes); ++r) to[r] = 0;
}

}  // namespace
}  // namespace inlay::moe
