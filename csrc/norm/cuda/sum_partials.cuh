// Second kernel of the backward: dweight and dbias from the blocks' partial sums, added in a fixed order.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/vector.cuh"
#include "norm/params.h"

namespace inlay::norm::cuda {

using namespace inlay::cuda;

inline constexpr int kSumColumns = 32;  // of a block: one for each lane
inline constexpr int kSumWarps = 32;    // each adds every 32nd row, then their sums are added in order

// Grid: (columns / 32, wanted vectors).
__global__ void __launch_bounds__(kSumColumns* kSumWarps)
    sum_partials_kernel(const __grid_constant__ BackwardParams p) {
  __shared__ float sums[kSumWarps][kSumColumns];
  const int lane = threadIdx.x % kSumColumns;
  const int warp = threadIdx.x / kSumColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + lane;
  const int64_t row_size = gridDim.y * p.width;
  const float* const partials = static_cast<const float*>(p.partials) + blockIdx.y * p.width + column;
  wait_for_predecessor();
  release_successor();
  float sum = 0.0f;
  if (column < p.width) {
#pragma unroll 16
    for (int64_t row = warp; row < p.partial_rows; row += kSumWarps) sum += partials[row * row_size];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && column < p.width) {
    float total[1] = {0.0f};
    for (int i = 0; i < kSumWarps; ++i) total[0] += sums[i][lane];
    const OutputTensor& target = blockIdx.y == 0 && p.dweight.data ? p.dweight : p.dbias;
    store_from_float(target.data, target.dtype, column, total);
  }
}

}  // namespace inlay::norm::cuda
