// Tiles and products whose widths are known only at run time, for 16-bit values and for float32.
//
// A tile is rows of 16-byte pieces, in panels of eight. As in common/cuda/tile.cuh, the pieces of a panel's row are
// permuted by the row. One step of a product takes two pieces of each operand's row: 16 values of 16 bits, 8 of
// float32; widths are rounded up to two steps, with zeros.
#pragma once

#include "common/cuda/split.cuh"
#include "common/cuda/tile.cuh"

namespace inlay::attention::cuda {

using namespace inlay::cuda;

constexpr int kPanelPieces = 8, kPieceBytes = 16, kPanelRowBytes = kPanelPieces * kPieceBytes;
constexpr int kWarpBytes = 256;  // of T: columns of results that one warp keeps

inline __host__ __device__ int pieces_of(int64_t columns, int64_t element_bytes) {
  return static_cast<int>((columns * element_bytes + 4 * kPieceBytes - 1) / (4 * kPieceBytes) * 4);
}

inline __host__ __device__ int tile_bytes(int rows, int pieces) {
  return (pieces + kPanelPieces - 1) / kPanelPieces * rows * kPanelRowBytes;
}

// A lane's place in a tile: of a row, the first or the second of a step's two pieces. Rows 8 further on are at 1024
// more bytes.
struct PieceCursor {
  uint32_t first;
  uint32_t panel_bytes;

  // Of step `piece`, which is even.
  __device__ __forceinline__ uint32_t at(uint32_t piece) const {
    return (first ^ piece % kPanelPieces * kPieceBytes) + piece / kPanelPieces * panel_bytes;
  }
};

struct PieceTile {
  uint32_t base;  // a multiple of kPanelRowBytes
  uint32_t rows;

  __device__ __forceinline__ PieceCursor cursor(uint32_t row, uint32_t odd) const {
    return {base + row * kPanelRowBytes + (odd ^ row) % kPanelPieces * kPieceBytes, rows * kPanelRowBytes};
  }
  __device__ __forceinline__ uint32_t address(uint32_t row, uint32_t piece) const {
    return cursor(row, piece % 2).at(piece - piece % 2);
  }

  // For load_matrices<false>: sixteen rows of a step, as an `a` of multiply_add() or multiply_add_tf32().
  __device__ __forceinline__ PieceCursor cursor_a(int row) const {
    const int lane = threadIdx.x % 32;
    return cursor(row + lane % 16, lane / 16);
  }
  // The same as two `b`, rows being their columns.
  __device__ __forceinline__ PieceCursor cursor_b(int row) const {
    const int lane = threadIdx.x % 32;
    return cursor(row + lane / 16 * 8 + lane % 8, lane / 8 % 2);
  }
  // For load_matrices<true>, of 16-bit values, as two `b`: rows are the summed dimension, the step's pieces are
  // columns.
  __device__ __forceinline__ PieceCursor cursor_b_transposed() const { return cursor_a(0); }
  // Of float32 values, one of a `b`, whose columns are a step's: of row `row`.
  __device__ __forceinline__ PieceCursor cursor_value(int row) const {
    const int column = threadIdx.x % 32 / 4;
    PieceCursor cursor = this->cursor(row, column / 4);
    cursor.first += column % 4 * 4;
    return cursor;
  }
};

constexpr int kSixteenRows = 16 * kPanelRowBytes, kEightRows = 8 * kPanelRowBytes;

// Fills a tile by `threads` threads, in the background where rows are aligned.
template <typename T>
__device__ __forceinline__ void fetch_rows(const PieceTile& tile, int pieces, const TileSource<T>& source,
                                           int threads) {
  constexpr int kPiece = kPieceBytes / sizeof(T);
  const int first_row = threadIdx.x / kPanelPieces, step = threads / kPanelPieces;
#pragma unroll 1
  for (int piece = threadIdx.x % kPanelPieces; piece < pieces; piece += kPanelPieces) {
    const int rows = piece * kPiece < source.columns ? source.rows : 0;
    const T* from = source.first + first_row * source.row_stride + piece * kPiece;
    uint32_t to = tile.address(first_row, piece);  // steps are multiples of 8 rows
    if (source.aligned) {
#pragma unroll 4
      for (int row = first_row; row < static_cast<int>(tile.rows); row += step) {
        copy_async_or_zero(to, row < rows ? from : source.first, row < rows);
        from += step * source.row_stride;
        to += step * kPanelRowBytes;
      }
    } else {
#pragma unroll 1
      for (int row = first_row; row < static_cast<int>(tile.rows); row += step) {
        Packed<T, kPiece> values{};
        if (row < rows) {
#pragma unroll
          for (int j = 0; j < kPiece; ++j) values.values[j] = from[j];
        }
        store_shared(to, *reinterpret_cast<const uint4*>(&values));
        from += step * source.row_stride;
        to += step * kPanelRowBytes;
      }
    }
  }
}

// s += a b^T over pieces [first, end), multiples of four, of kRowTiles * 16 rows of a and kPairs * 16 rows of b.
// `tf32`: float32 may be rounded so.
template <typename T, int kRowTiles, int kPairs, int kTiles>
__device__ __forceinline__ void add_scores(Accumulator (*s)[kTiles], const PieceTile& a, int a_row, const PieceTile& b,
                                           int first, int end, bool tf32) {
  static_assert(2 * kPairs <= kTiles);
  const PieceCursor rows_at = a.cursor_a(a_row), columns_at = b.cursor_b(0);
  constexpr int kUnroll = kRowTiles * kPairs < 4 && sizeof(T) == 2 ? 2 : 1;
#pragma unroll kUnroll
  for (int piece = first; piece < end; piece += 4) {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int step = 0; step < 4; step += 2) {
        Fragment rows[kRowTiles];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) load_matrices<false>(rows[m], rows_at.at(piece + step) + m * kSixteenRows);
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          Fragment columns;
          load_matrices<false>(columns, columns_at.at(piece + step) + pair * kSixteenRows);
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            multiply_add<T>(s[m][2 * pair], rows[m], columns[0], columns[1]);
            multiply_add<T>(s[m][2 * pair + 1], rows[m], columns[2], columns[3]);
          }
        }
      }
    } else {
      SplitFragment rows[2][kRowTiles];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          Fragment words;
          load_matrices<false>(words, rows_at.at(piece + 2 * step) + m * kSixteenRows);
          rows[step][m].set(__uint_as_float(words[0]), __uint_as_float(words[1]), __uint_as_float(words[2]),
                            __uint_as_float(words[3]));
        }
      }
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        Fragment columns[2];
        load_matrices<false>(columns[0], columns_at.at(piece) + pair * kSixteenRows);
        load_matrices<false>(columns[1], columns_at.at(piece + 2) + pair * kSixteenRows);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            Accumulator large{}, small{};
#pragma unroll
            for (int step = 0; step < 2; ++step) {
              multiply_add_split(large, small, rows[step][m], __uint_as_float(columns[step][2 * half]),
                                 __uint_as_float(columns[step][2 * half + 1]), tf32);
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) s[m][2 * pair + half][j] += large[j] + small[j];
          }
        }
      }
    }
  }
}

// The same for a number of pairs known at run time: kMost, or a half or a quarter of it.
template <typename T, int kRowTiles, int kMost, int kTiles>
__device__ __forceinline__ void add_scores_of(int pairs, Accumulator (*s)[kTiles], const PieceTile& a, int a_row,
                                              const PieceTile& b, int first, int end, bool tf32) {
  if (pairs == kMost) {
    add_scores<T, kRowTiles, kMost>(s, a, a_row, b, first, end, tf32);
  } else {
    if constexpr (kMost > 1) add_scores_of<T, kRowTiles, kMost / 2>(pairs, s, a, a_row, b, first, end, tf32);
  }
}

// Values of scores' tiles as the `a` of a product that sums over the scores' columns.
template <typename T, int kTiles>
struct ProbabilityFragments {
  static_assert(sizeof(T) == 2);
  Fragment words[kTiles / 2];

  __device__ __forceinline__ void set(const Accumulator (&s)[kTiles]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      words[i / 2][i % 2 * 2] = pack_pair<T>(s[i][0], s[i][1]);
      words[i / 2][i % 2 * 2 + 1] = pack_pair<T>(s[i][2], s[i][3]);
    }
  }
};

// A step's eight columns in an order of their own: thread t has 2t and 2t + 1, as in scores.
template <int kTiles>
struct ProbabilityFragments<float, kTiles> {
  SplitFragment parts[kTiles];

  __device__ __forceinline__ void set(const Accumulator (&s)[kTiles]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) parts[i].set(s[i][0], s[i][2], s[i][1], s[i][3]);
  }
};

// result += p b. p's columns are the first `rows` of b, a multiple of 16; of b's columns those from piece `first` on,
// `pieces` of them: a multiple of four, or less than one, and no more than the result has.
template <typename T, int kRowTiles, int kTiles, int kResultTiles>
__device__ __forceinline__ void add_values(Accumulator (&result)[kRowTiles][kResultTiles],
                                           const ProbabilityFragments<T, kTiles> (&p)[kRowTiles], const PieceTile& b,
                                           int rows, int first, int pieces, bool tf32) {
  if constexpr (sizeof(T) == 2) {
    const PieceCursor columns_at = b.cursor_b_transposed();
#pragma unroll
    for (int step = 0; step < kTiles / 2; ++step) {
      if (step * 16 >= rows) break;
#pragma unroll
      for (int group = 0; group < kResultTiles / 4; ++group) {
        if (group * 4 >= pieces) break;
#pragma unroll
        for (int pair = 2 * group; pair < 2 * group + 2; ++pair) {
          Fragment columns;
          load_matrices<true>(columns, columns_at.at(first + 2 * pair) + step * kSixteenRows);
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            multiply_add<T>(result[m][2 * pair], p[m].words[step], columns[0], columns[1]);
            multiply_add<T>(result[m][2 * pair + 1], p[m].words[step], columns[2], columns[3]);
          }
        }
      }
    }
  } else {
    const int own_row = threadIdx.x % 4 * 2;
    const PieceCursor even = b.cursor_value(own_row), odd = b.cursor_value(own_row + 1);
#pragma unroll
    for (int tile = 0; tile < kResultTiles; ++tile) {
      if (tile * 2 >= pieces) break;
      Accumulator large[kRowTiles]{}, small[kRowTiles]{};
#pragma unroll
      for (int step = 0; step < kTiles; ++step) {
        if (step * 8 >= rows) break;
        const float b0 = __uint_as_float(load_shared_word(even.at(first + 2 * tile) + step * kEightRows));
        const float b1 = __uint_as_float(load_shared_word(odd.at(first + 2 * tile) + step * kEightRows));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) multiply_add_split(large[m], small[m], p[m].parts[step], b0, b1, tf32);
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int j = 0; j < 4; ++j) result[m][tile][j] += large[m][j] + small[m][j];
      }
    }
  }
}

}  // namespace inlay::attention::cuda
