// Products of small matrices that lie in the cache, over any vector type: C = factor * C + A B.
//
// C is worked on in tiles that stay in registers: `rows` rows of `vectors` vectors. For each column panel of C, the
// panel of B (at most a few hundred rows of two vectors) stays in the first-level cache while the rows of A pass by. A
// is read element by element, so that it may just as well be stored transposed; nothing is packed. Each element of C is
// one chain of fused multiply-adds from k = 0 upwards, whatever the tiles: results depend on neither the blocking nor
// on which columns or rows are computed together.
//
// `Gemm<Vec>` is where a tier with matrix instructions puts its own: a specialisation for its vector type.
#pragma once

#include "common/cpu/matrix.h"

namespace inlay::cpu {
namespace {

// Which elements of A are not known to be zero, i its row in the product (its column in memory where transposed).
enum class Band {
  full,
  lower,  // k <= i
  upper,  // k >= i
};

// Which elements of C are wanted; the others are left as they were or get some value.
enum class Wanted {
  all,
  lower,  // column <= row
};

template <class Scalar>
struct GemmOperands {
  int64_t m, n, k;      // n a multiple of the vector's lanes
  Matrix<Scalar> a;     // [m, k], or [k, m] where A is stored transposed
  Matrix<Scalar> b;     // [k, n]
  Matrix<Scalar> c;     // [m, n]
  Scalar c_factor = 0;  // 0: C is not read
  Band a_band = Band::full;
  Wanted wanted = Wanted::all;
};

// The tile's accumulators, the vectors of B and one element of A fill the registers: 16, or 32 of AVX-512.
template <int64_t vector_bytes>
struct GemmTile {
  static constexpr int64_t rows = vector_bytes == 64 ? 12 : 6;
  static constexpr int64_t vectors = 2;
};

template <class Vec>
struct Gemm {
  using Scalar = typename Vec::Scalar;
  using Operands = GemmOperands<Scalar>;
  using Tile = GemmTile<Vec::lanes* static_cast<int64_t>(sizeof(Scalar))>;

  template <bool a_transposed>
  static void run(const Operands& p) {
    constexpr int64_t panel = Tile::vectors * Vec::lanes;
    int64_t j = 0;
    for (; j + panel <= p.n; j += panel) column_panel<a_transposed, Tile::vectors>(p, j);
    for (; j < p.n; j += Vec::lanes) column_panel<a_transposed, 1>(p, j);
  }

 private:
  // Rows are dealt out evenly: a short last tile would leave the multipliers waiting for each other.
  template <bool a_transposed, int64_t vectors>
  [[gnu::noinline]] static void column_panel(const Operands& p, int64_t j) {
    const int64_t blocks = (p.m + Tile::rows - 1) / Tile::rows;
    int64_t i = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t rows = (p.m - i + blocks - block - 1) / (blocks - block);
      if (p.wanted == Wanted::all || j < i + rows) {
        const int64_t begin = p.a_band == Band::upper ? (i < p.k ? i : p.k) : 0;
        const int64_t end = p.a_band == Band::lower && i + rows < p.k ? i + rows : p.k;
        tile_of_rows<a_transposed, vectors, Tile::rows>(p, i, j, rows, begin, end);
      }
      i += rows;
    }
  }

  template <bool a_transposed, int64_t vectors, int64_t rows>
  INLAY_INLINE static void tile_of_rows(const Operands& p, int64_t i, int64_t j, int64_t count, int64_t begin,
                                        int64_t end) {
    if constexpr (rows > 1) {
      if (count < rows) return tile_of_rows<a_transposed, vectors, rows - 1>(p, i, j, count, begin, end);
    }
    tile<a_transposed, vectors, rows>(p, i, j, begin, end);
  }

  template <bool a_transposed, int64_t vectors, int64_t rows>
  [[gnu::noinline]] static void tile(const Operands& p, int64_t i, int64_t j, int64_t begin, int64_t end) {
    const int64_t stride = p.a.stride;
    Vec sums[rows][vectors];
    if (p.c_factor == 0) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t v = 0; v < vectors; ++v) sums[r][v] = Vec::set(0);
      }
    } else {
      const Vec factor = Vec::set(p.c_factor);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t v = 0; v < vectors; ++v) {
          sums[r][v] = factor * Vec::load(p.c.row(i + r) + j + v * Vec::lanes, Full{});
        }
      }
    }
    // A pointer for every third row: the rows between are reached by x86's scaled addressing.
    constexpr int64_t pointers = a_transposed ? 1 : (rows + 2) / 3;
    const Scalar* a[pointers];
    for (int64_t r = 0; r < pointers; ++r) {
      a[r] = a_transposed ? p.a.data + begin * stride + i : p.a.data + (i + 3 * r) * stride + begin;
    }
    const Scalar* b = p.b.row(begin) + j;
    for (int64_t k = begin; k < end; ++k) {
      Vec right[vectors];
      for (int64_t v = 0; v < vectors; ++v) right[v] = Vec::load(b + v * Vec::lanes, Full{});
      b += p.b.stride;
      for (int64_t r = 0; r < rows; ++r) {
        const Vec left = Vec::set(a_transposed ? a[0][r] : a[a_transposed ? 0 : r / 3][r % 3 * stride]);
        for (int64_t v = 0; v < vectors; ++v) sums[r][v] = fma(left, right[v], sums[r][v]);
      }
      for (int64_t r = 0; r < pointers; ++r) a[r] += a_transposed ? stride : 1;
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t v = 0; v < vectors; ++v) Vec::store(p.c.row(i + r) + j + v * Vec::lanes, sums[r][v], Full{});
    }
  }
};

// C = factor * C + A B.
template <class Vec>
INLAY_INLINE void multiply(const GemmOperands<typename Vec::Scalar>& operands) {
  Gemm<Vec>::template run<false>(operands);
}

// The same with A stored transposed: p.a is [k, m].
template <class Vec>
INLAY_INLINE void multiply_transposed(const GemmOperands<typename Vec::Scalar>& operands) {
  Gemm<Vec>::template run<true>(operands);
}

}  // namespace
}  // namespace inlay::cpu
