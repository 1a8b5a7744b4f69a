// The gradients of experts' matrices: for each expert the sum over its rows of outer products. A block has 64 rows and
// up to 128 columns of one expert's matrix; it is zero where the expert has no row.
#pragma once

#include "moe/cuda/general_products.cuh"

namespace inlay::moe::cuda {

struct OuterProducts {
  PaddedRows padded;
  Rows rows;
  RowMatrix left, right;  // whose columns are the matrices' rows, and columns
  int height = 0, width = 0;
  int64_t experts = 0;
  void* results = nullptr;  // [E, height, width]

  __host__ __device__ int row_tiles() const { return (height + kTileRows - 1) / kTileRows; }
  __host__ __device__ int column_tiles() const { return (width + kTileColumns - 1) / kTileColumns; }
};

// Of a row matrix, the columns that a block needs, by rows of an expert. A thread knows its rows of the next step
// before it fetches them.
template <typename T, int kGroups>
class OuterOperand {
 public:
  __device__ __forceinline__ OuterOperand(const RowMatrix& matrix, const PaddedRows& padded, const ExpertRows& own,
                                          int first, int end)
      : data_(static_cast<const T*>(matrix.data) + first),
        tokens_(matrix.of_tokens ? padded.tokens : nullptr),
        stride_(matrix.row_stride),
        columns_(end - first),
        row_(own.padded + static_cast<int>(threadIdx.x) / 8),
        end_(own.padded + own.count),
        aligned_(is_aligned(data_, stride_ * static_cast<int64_t>(sizeof(T)))) {
    find_rows();
  }

  __device__ __forceinline__ void fetch(uint32_t to) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      fetch_across<T>(
          to + g * kGroupBytes, columns_ - g * kGroupColumns, aligned_,
          [&](int i) { return data_ + max(rows_[i], 0) * stride_ + g * kGroupColumns; },
          [&](int i) { return rows_[i] >= 0; });
    }
    row_ += kDepth<T>;
    find_rows();
  }

 private:
  __device__ __forceinline__ void find_rows() {
#pragma unroll
    for (int i = 0; i < kDepth<T> / 16; ++i) {
      const int row = row_ + 16 * i;
      rows_[i] = row >= end_ ? -1 : tokens_ ? tokens_[row] : row;
    }
  }

  const T* data_;
  const int32_t* tokens_;
  int64_t stride_;
  int columns_;
  int row_, end_;
  int rows_[kDepth<T> / 16];
  bool aligned_;
};

template <typename T>
__global__ __launch_bounds__(kTileThreads, 3) void outer_kernel(const __grid_constant__ OuterProducts p) {
  wait_for_predecessor();
  release_successor();
  const int columns = p.column_tiles(), tiles = p.row_tiles() * columns;
  const int expert = static_cast<int>(blockIdx.x) / tiles, tile = static_cast<int>(blockIdx.x) % tiles;
  const int row = tile / columns * kTileRows, column = tile % columns * kTileColumns;
  const ExpertRows own(p.rows, p.padded, expert);
  OuterOperand<T, 1> left(p.left, p.padded, own, row, p.height);
  OuterOperand<T, 2> right(p.right, p.padded, own, column, p.width);
  TileSums sums;
  sum_products(
      sums, (own.count + kDepth<T> - 1) / kDepth<T>,
      [&](uint32_t stage, int) {
        left.fetch(stage);
        right.fetch(stage + kGroupBytes);
      },
      [&](TileSums& to, uint32_t stage) { add_products<T, false, false>(to, stage); });
  T* const results = static_cast<T*>(p.results) + (int64_t{expert} * p.height + row) * p.width + column;
  const int rows = min(kTileRows, p.height - row);
  store_results(share_sums(sums), results, p.width, rows, rows, p.width - column, [](int) { return 0.0f; });
}

template <typename T>
void start_outer(const OuterProducts& p, void* stream) {
  const int64_t blocks = p.experts * p.row_tiles() * p.column_tiles();
  if (blocks > 0) {
    start<outer_kernel<T>, kTileThreads, kTileSharedBytes>(p, dim3(static_cast<unsigned>(blocks)), stream);
  }
}

}  // namespace inlay::moe::cuda
