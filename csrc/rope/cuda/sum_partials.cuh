// Second kernel of the backward: the weights' gradients from the blocks' partial sums, added in a fixed order.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/partial_sums.cuh"
#include "common/cuda/vector.cuh"
#include "rope/params.h"

namespace inlay::rope::cuda {

using namespace inlay::cuda;

// Few columns a block and small blocks: what this kernel takes is latency, and many blocks hide it.
inline constexpr int kSumColumns = 8;
inline constexpr int kSumThreads = 256;

// Grid: (columns / kSumColumns, q and k).
__global__ void __launch_bounds__(kSumThreads) sum_partials_kernel(const __grid_constant__ BackwardParams p) {
  const BackwardSide& side = blockIdx.y == 0 ? p.q : p.k;
  wait_for_predecessor();
  release_successor();
  if (!side.partials) return;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x % kSumColumns;
  const float total[1] = {sum_of_column<kSumColumns, kSumThreads>(static_cast<const float*>(side.partials) + column,
                                                                  side.partial_rows, p.width, column < p.width)};
  if (threadIdx.x < kSumColumns && column < p.width) {
    store_from_float(side.dweight.data, side.dweight.dtype, column, total);
  }
}

}  // namespace inlay::rope::cuda
