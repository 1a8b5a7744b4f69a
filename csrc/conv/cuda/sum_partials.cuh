// Second kernel of the backward: dweight and dbias from the groups' partial sums, added in a fixed order.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/vector.cuh"
#include "conv/params.h"

namespace inlay::conv::cuda {

using namespace inlay::cuda;

inline constexpr int kSumColumns = 32;  // of a block: one for each lane
inline constexpr int kSumWarps = 16;    // each adds every 16th group, then their sums are added in order

// Grid: (channels / 32, sums).
__global__ void __launch_bounds__(kSumColumns* kSumWarps)
    sum_partials_kernel(const __grid_constant__ BackwardParams p) {
  __shared__ float sums[kSumWarps][kSumColumns];
  const int lane = threadIdx.x % kSumColumns;
  const int warp = threadIdx.x / kSumColumns;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kSumColumns + lane;
  const int64_t group_size = gridDim.y * p.channels;
  const float* const partials = static_cast<const float*>(p.partials) + blockIdx.y * p.channels + channel;
  wait_for_predecessor();
  release_successor();
  float sum = 0.0f;
  if (channel < p.channels) {
#pragma unroll 8
    for (int64_t group = warp; group < p.partial_rows; group += kSumWarps) sum += partials[group * group_size];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || channel >= p.channels) return;
  float total[1] = {0.0f};
  for (int i = 0; i < kSumWarps; ++i) total[0] += sums[i][lane];
  if (p.dweight.data && blockIdx.y < p.width) {
    store_from_float(p.dweight.data, p.dweight.dtype, channel * p.width + blockIdx.y, total);
  } else {
    store_from_float(p.dbias.data, p.dbias.dtype, channel, total);
  }
}

}  // namespace inlay::conv::cuda
