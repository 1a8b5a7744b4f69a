// Second kernel of the backward: dweight and dbias from the groups' partial sums, added in a fixed order.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/partial_sums.cuh"
#include "common/cuda/vector.cuh"
#include "conv/params.h"

namespace inlay::conv::cuda {

using namespace inlay::cuda;

inline constexpr int kSumColumns = 32;  // of a block: one for each lane
inline constexpr int kSumWarps = 16;    // each adds every 16th group, then their sums are added in order

// Grid: (channels / 32, sums).
__global__ void __launch_bounds__(kSumColumns* kSumWarps)
    sum_partials_kernel(const __grid_constant__ BackwardParams p) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x % kSumColumns;
  const int64_t group_size = gridDim.y * p.channels;
  const float* const partials = static_cast<const float*>(p.partials) + blockIdx.y * p.channels + channel;
  wait_for_predecessor();
  release_successor();
  const float total[1] = {
      sum_of_column<kSumColumns, kSumColumns * kSumWarps>(partials, p.partial_rows, group_size, channel < p.channels)};
  if (threadIdx.x >= kSumColumns || channel >= p.channels) return;
  if (p.dweight.data && blockIdx.y < p.width) {
    store_from_float(p.dweight.data, p.dweight.dtype, channel * p.width + blockIdx.y, total);
  } else {
    store_from_float(p.dbias.data, p.dbias.dtype, channel, total);
  }
}

}  // namespace inlay::conv::cuda
