// Tiles of 16-bit values in shared memory, as the tensor cores read them.
#pragma once

#include "common/cuda/mma.cuh"
#include "common/cuda/pipeline.cuh"

namespace inlay::cuda {

// [kRows, kColumns] in panels of 64 columns. The eight 16-byte pieces of a panel's row are permuted by the row, so that
// eight rows of one column, or eight columns of one row, lie in different banks. Aligned to 1024 bytes.
template <typename T, int kRows_, int kColumns_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr unsigned kPanelColumns = 64, kPieceColumns = 8;
  static constexpr int kPanelBytes = kRows * int{kPanelColumns} * 2;
  static constexpr int kBytes = kPanelBytes * ((kColumns + int{kPanelColumns} - 1) / int{kPanelColumns});
  static_assert(sizeof(T) == 2 && kRows % 8 == 0);

  // Of the piece that holds (row, column), in bytes.
  __device__ static uint32_t offset(unsigned row, unsigned column) {
    const unsigned piece = column % kPanelColumns / kPieceColumns;
    return column / kPanelColumns * kPanelBytes + row * (kPanelColumns * 2) + ((piece ^ (row % 8)) * 16);
  }
};

// A tile's address in shared memory, and what one warp reads of it.
template <typename T, int kRows, int kColumns>
struct TileView {
  using Layout = Tile<T, kRows, kColumns>;
  uint32_t base;

  // Of the piece of eight columns that holds (row, column).
  __device__ uint32_t address(unsigned row, unsigned column) const { return base + Layout::offset(row, column); }

  // [16, 16] from (row, column), multiples of 16. As an `a`: rows are its rows. Transposed, as two `b`: rows are the
  // summed dimension, columns the two tiles of 8.
  template <bool kTransposed>
  __device__ void load_rows_first(Fragment& r, int row, int column) const {
    const unsigned lane = threadIdx.x % 32;
    load_matrices<kTransposed>(r, address(row + lane % 16, column + lane / 16 * 8));
  }

  // The opposite of load_rows_first<false>.
  __device__ void store_rows_first(const Fragment& r, int row, int column) const {
    const unsigned lane = threadIdx.x % 32;
    store_matrices<false>(address(row + lane % 16, column + lane / 16 * 8), r);
  }

  // As two `b`: rows are the two tiles of 8, columns the summed dimension. Transposed, as an `a`: columns are its rows.
  template <bool kTransposed>
  __device__ void load_columns_first(Fragment& r, int row, int column) const {
    const unsigned lane = threadIdx.x % 32;
    load_matrices<kTransposed>(r, address(row + lane / 16 * 8 + lane % 8, column + lane / 8 % 2 * 8));
  }

  // The opposite of load_columns_first<true>.
  __device__ void store_columns_first(const Fragment& r, int row, int column) const {
    const unsigned lane = threadIdx.x % 32;
    store_matrices<true>(address(row + lane / 16 * 8 + lane % 8, column + lane / 8 % 2 * 8), r);
  }
};

// The rows of a tensor that a tile is filled with.
template <typename T>
struct TileSource {
  const T* first;  // row 0, column 0
  int64_t row_stride;
  int rows;      // the tile's others are zero
  int columns;   // likewise; a multiple of 8
  bool aligned;  // rows start at multiples of 16 bytes
};

// Fills a tile by `kThreads` threads, in the background where rows are aligned. Visible after the copies were waited
// for and a barrier. Each thread keeps to one column; where nothing is missing, little is left to compute for a piece.
template <int kThreads, typename T, int kRows, int kColumns>
__device__ __forceinline__ void fetch_tile(TileView<T, kRows, kColumns> tile, const TileSource<T>& source,
                                           unsigned thread) {
  constexpr unsigned kPieces = kColumns / 8, kRowStep = kThreads / kPieces;
  static_assert(kThreads % kPieces == 0 && kRows % kRowStep == 0);
  const unsigned first_row = thread / kPieces, column = thread % kPieces * 8;
  const T* from = source.first + first_row * source.row_stride + column;
  const int64_t step = kRowStep * source.row_stride;
  if (source.aligned && source.rows == kRows && source.columns >= kColumns) {
#pragma unroll
    for (unsigned i = 0; i < kRows / kRowStep; ++i, from += step) {
      copy_async(tile.address(first_row + i * kRowStep, column), from);
    }
    return;
  }
  const unsigned rows = column < static_cast<unsigned>(max(source.columns, 0)) ? source.rows : 0;
#pragma unroll 1
  for (unsigned row = first_row; row < kRows; row += kRowStep, from += step) {
    if (source.aligned) {
      copy_async_or_zero(tile.address(row, column), from, row < rows);
    } else {
      Packed<T, 8> piece{};
      if (row < rows) {
#pragma unroll
        for (int j = 0; j < 8; ++j) piece.values[j] = from[j];
      }
      store_shared(tile.address(row, column), *reinterpret_cast<const uint4*>(&piece));
    }
  }
}

}  // namespace inlay::cuda
