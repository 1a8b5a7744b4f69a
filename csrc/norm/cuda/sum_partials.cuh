// Second kernel of the backward: dweight and dbias from the blocks' partial sums, added in a fixed order.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/vector.cuh"
#include "norm/params.h"

namespace inlay::norm::cuda {

using namespace inlay::cuda;

// Few columns a block and small blocks: what this kernel takes is latency, and many blocks hide it.
inline constexpr int kSumColumns = 8;    // of a block; each row of them is one sector of memory
inline constexpr int kSumThreads = 256;  // 32 rows of them at a time

// Grid: (columns / kSumColumns, wanted vectors).
__global__ void __launch_bounds__(kSumThreads) sum_partials_kernel(const __grid_constant__ BackwardParams p) {
  constexpr int kRows = kSumThreads / kSumColumns;
  __shared__ float sums[kRows][kSumColumns];
  const int lane = threadIdx.x % kSumColumns;
  const int first_row = threadIdx.x / kSumColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + lane;
  const int64_t row_size = gridDim.y * p.width;
  const float* const partials = static_cast<const float*>(p.partials) + blockIdx.y * p.width + column;
  wait_for_predecessor();
  release_successor();
  float sum = 0.0f;
  if (column < p.width) {
#pragma unroll 16
    for (int64_t row = first_row; row < p.partial_rows; row += kRows) sum += partials[row * row_size];
  }
  sums[first_row][lane] = sum;
  __syncthreads();
  if (first_row == 0 && column < p.width) {
    float total[1] = {0.0f};
#pragma unroll
    for (int i = 0; i < kRows; ++i) total[0] += sums[i][lane];
    const OutputTensor& target = blockIdx.y == 0 && p.dweight.data ? p.dweight : p.dbias;
    store_from_float(target.data, target.dtype, column, total);
  }
}

}  // namespace inlay::norm::cuda
