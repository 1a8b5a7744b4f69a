// Second kernel of the backward: dweight and dbias from the blocks' partial sums, added in a fixed order.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/partial_sums.cuh"
#include "common/cuda/vector.cuh"
#include "norm/params.h"

namespace inlay::norm::cuda {

using namespace inlay::cuda;

// Few columns a block and small blocks: what this kernel takes is latency, and many blocks hide it.
inline constexpr int kSumColumns = 8;    // of a block; each row of them is one sector of memory
inline constexpr int kSumThreads = 256;  // 32 rows of them at a time

// Grid: (columns / kSumColumns, wanted vectors).
__global__ void __launch_bounds__(kSumThreads) sum_partials_kernel(const __grid_constant__ BackwardParams p) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x % kSumColumns;
  const int64_t row_size = gridDim.y * p.width;
  const float* const partials = static_cast<const float*>(p.partials) + blockIdx.y * p.width + column;
  wait_for_predecessor();
  release_successor();
  const float total[1] = {
      sum_of_column<kSumColumns, kSumThreads>(partials, p.partial_rows, row_size, column < p.width)};
  if (threadIdx.x < kSumColumns && column < p.width) {
    const OutputTensor& target = blockIdx.y == 0 && p.dweight.data ? p.dweight : p.dbias;
    store_from_float(target.data, target.dtype, column, total);
  }
}

}  // namespace inlay::norm::cuda
