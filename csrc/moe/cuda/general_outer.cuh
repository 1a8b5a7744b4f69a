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

// A group of columns of a row matrix, by rows of an expert.
template <typename T>
struct ColumnGroup {
  const T* data;  // of the expert's first row, or token 0
  const int32_t* tokens;
  int64_t stride;
  int columns;
  bool aligned;

  __device__ __forceinline__ ColumnGroup(const RowMatrix& matrix, const PaddedRows& padded, const ExpertRows& own,
                                         int first, int end)
      : tokens(matrix.of_tokens ? padded.tokens + own.padded : nullptr),
        stride(matrix.row_stride),
        columns(end - first) {
    data = static_cast<const T*>(matrix.data) + first + (tokens ? 0 : own.padded * stride);
    aligned = is_aligned(data, stride * static_cast<int64_t>(sizeof(T)));
  }

  __device__ __forceinline__ void fetch(uint32_t to, int row, int end) const {
    row += threadIdx.x / 8;
    fetch_across(to, columns, data, aligned, [&](int i) -> const T* {
      if (row + 16 * i >= end) return nullptr;
      return data + int64_t{tokens ? tokens[row + 16 * i] : row + 16 * i} * stride;
    });
  }
};

template <typename T>
__global__ __launch_bounds__(kTileThreads, 3) void outer_kernel(const __grid_constant__ OuterProducts p) {
  wait_for_predecessor();
  release_successor();
  const int columns = p.column_tiles(), tiles = p.row_tiles() * columns;
  const int expert = static_cast<int>(blockIdx.x) / tiles, tile = static_cast<int>(blockIdx.x) % tiles;
  const int row = tile / columns * kTileRows, column = tile % columns * kTileColumns;
  const ExpertRows own(p.rows, p.padded, expert);
  const ColumnGroup<T> left(p.left, p.padded, own, row, p.height);
  const ColumnGroup<T> right[2] = {{p.right, p.padded, own, column, p.width},
                                   {p.right, p.padded, own, column + kGroupColumns, p.width}};
  TileSums sums;
  sum_products(
      sums, (own.count + kDepth<T> - 1) / kDepth<T>,
      [&](uint32_t stage, int step) {
        left.fetch(stage, step * kDepth<T>, own.count);
#pragma unroll
        for (int g = 0; g < 2; ++g) right[g].fetch(stage + (1 + g) * kGroupBytes, step * kDepth<T>, own.count);
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
