// Which tiles there are, found on the device, and the order in which blocks take them.
#pragma once

#include <cstdint>

#include "moe/cuda/tile_sizes.h"

namespace inlay::moe::cuda {

// 128 rows of an expert, or fewer, by 256 columns.
struct RowTile {
  int expert;
  int row;        // the first, of the expert's
  int rows;       // from there on, that the expert has
  int first_row;  // of the expert's rows, in their order
  int first_padded;
  int column_tile;
};

#ifdef __CUDACC__

// A block's list of experts, in shared memory: what comes before each. One more than there are experts.
struct TileOrder {
  int ends[kMostTiledExperts + 1];
  int units[kMostTiledExperts + 1];  // of padded rows
  int tiles[kMostTiledExperts + 1];

  // By the first warp, when ends[1] and the following are there and visible to it.
  __device__ void find(int experts, int column_tiles) {
    const int lane = threadIdx.x % 32;
    int units_before = 0, tiles_before = 0;
    if (lane == 0) ends[0] = units[0] = tiles[0] = 0;
    __syncwarp();
    for (int first = 0; first < experts; first += 32) {
      const int expert = first + lane;
      const int rows = expert < experts ? ends[expert + 1] - ends[expert] : 0;
      int own_units = (rows + kPaddedUnit - 1) / kPaddedUnit;
      int own_tiles = (rows + kTileRows - 1) / kTileRows * column_tiles;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const int other_units = __shfl_up_sync(0xffffffffu, own_units, offset);
        const int other_tiles = __shfl_up_sync(0xffffffffu, own_tiles, offset);
        if (lane >= offset) {
          own_units += other_units;
          own_tiles += other_tiles;
        }
      }
      if (expert < experts) {
        units[expert + 1] = units_before + own_units;
        tiles[expert + 1] = tiles_before + own_tiles;
      }
      units_before += __shfl_sync(0xffffffffu, own_units, 31);
      tiles_before += __shfl_sync(0xffffffffu, own_tiles, 31);
    }
  }

  // The expert of a tile, at least `expert`; by a whole warp.
  __device__ int expert_of(int tile, int expert, int experts) const {
    const int lane = threadIdx.x % 32;
    while (true) {
      const int last = min(expert + lane + 1, experts);
      const unsigned beyond = __ballot_sync(0xffffffffu, tiles[last] > tile);
      if (beyond != 0) return expert + __ffs(beyond) - 1;
      expert += 32;
    }
  }

  // All of an expert's rows come before the next columns: they stay in the cache, and the matrix is read once.
  __device__ RowTile find_tile(int tile, int expert) const {
    RowTile found;
    const int rows = ends[expert + 1] - ends[expert], row_tiles = (rows + kTileRows - 1) / kTileRows;
    const int own = tile - tiles[expert];
    found.expert = expert;
    found.column_tile = own / row_tiles;
    found.row = (own - found.column_tile * row_tiles) * kTileRows;
    found.rows = min(rows - found.row, kTileRows);
    found.first_row = ends[expert];
    found.first_padded = units[expert] * kPaddedUnit;
    return found;
  }
};

// By all threads of a block.
__device__ inline void find_tiles(TileOrder& order, const int32_t* ends, int experts, int column_tiles) {
  for (int i = threadIdx.x; i < experts; i += kTileThreads) order.ends[i + 1] = ends[i];
  __syncthreads();
  if (threadIdx.x < 32) order.find(experts, column_tiles);
  __syncthreads();
}

#endif

}  // namespace inlay::moe::cuda
