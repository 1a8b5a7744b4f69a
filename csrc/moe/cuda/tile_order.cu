#include "moe/cuda/tile_order.cuh"

#include "common/cuda/launch.cuh"

namespace inlay::moe::cuda {
namespace {

using namespace inlay::cuda;

constexpr int kThreads = 1024;  // an expert each, at a time

__global__ __launch_bounds__(kThreads) void tile_kernel(TileTable table) {
  __shared__ int2 sums[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int2 before = make_int2(0, 0);
  wait_for_predecessor();
  release_successor();
  if (threadIdx.x == 0) table.units[0] = table.row_tiles[0] = 0;
  if (threadIdx.x == 0) *table.taken = 0;
  const auto scan = [&](int2& own) {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int units = __shfl_up_sync(0xffffffffu, own.x, offset), tiles = __shfl_up_sync(0xffffffffu, own.y, offset);
      if (lane >= offset) own = make_int2(own.x + units, own.y + tiles);
    }
  };
  for (int first = 0; first < table.experts; first += kThreads) {
    const int expert = first + static_cast<int>(threadIdx.x);
    int rows = 0;
    if (expert < table.experts) rows = table.ends[expert] - (expert > 0 ? table.ends[expert - 1] : 0);
    int2 own = make_int2((rows + kPaddedUnit - 1) / kPaddedUnit, (rows + kTileRows - 1) / kTileRows);
    scan(own);
    if (lane == 31) sums[warp] = own;
    __syncthreads();
    if (warp == 0) {
      int2 of_warp = sums[lane];
      scan(of_warp);
      sums[lane] = of_warp;
    }
    __syncthreads();
    if (warp > 0) own = make_int2(own.x + sums[warp - 1].x, own.y + sums[warp - 1].y);
    if (expert < table.experts) {
      table.units[expert + 1] = before.x + own.x;
      table.row_tiles[expert + 1] = before.y + own.y;
    }
    before = make_int2(before.x + sums[31].x, before.y + sums[31].y);
    __syncthreads();
  }
}

}  // namespace

void find_tiles(const TileTable& table, void* stream) { start<tile_kernel, kThreads>(table, dim3(1), stream); }

}  // namespace inlay::moe::cuda
