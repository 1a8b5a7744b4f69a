// Which tiles there are, and the order in which blocks take them.
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

// What comes before each expert, and before none, in device memory; written by find_tiles().
struct TileTable {
  const int32_t* ends = nullptr;  // [E] of rows, as in Rows
  int32_t* units = nullptr;       // [E + 1] of padded rows
  int32_t* row_tiles = nullptr;   // [E + 1]
  int32_t* taken = nullptr;       // how many tiles were dealt beside each block's first, see TileDealer
  int experts = 0;
};

void find_tiles(const TileTable& table, void* stream);

#ifdef __CUDACC__

// All of an expert's rows come before the next columns: they stay in the cache, and the matrix is read once.
class TileOrder {
 public:
  __device__ TileOrder(const TileTable& table, int column_tiles)
      : tiles(table.row_tiles[table.experts] * column_tiles), table_(table), column_tiles_(column_tiles) {}

  // A tile after those that were asked for before; by a whole warp.
  __device__ RowTile find(int tile) {
    const int lane = threadIdx.x % 32, row_tile = tile / column_tiles_;
    while (true) {
      const int last = min(expert_ + lane + 1, table_.experts);
      const unsigned beyond = __ballot_sync(0xffffffffu, table_.row_tiles[last] > row_tile);
      if (beyond != 0) {
        expert_ += __ffs(beyond) - 1;
        break;
      }
      expert_ += 32;
    }
    RowTile found;
    found.expert = expert_;
    found.first_row = expert_ > 0 ? table_.ends[expert_ - 1] : 0;
    found.first_padded = table_.units[expert_] * kPaddedUnit;
    const int rows = table_.ends[expert_] - found.first_row, row_tiles = (rows + kTileRows - 1) / kTileRows;
    const int own = tile - table_.row_tiles[expert_] * column_tiles_;
    found.column_tile = own / row_tiles;
    found.row = (own - found.column_tile * row_tiles) * kTileRows;
    found.rows = min(rows - found.row, kTileRows);
    return found;
  }

  int tiles;

 private:
  const TileTable& table_;
  int column_tiles_;
  int expert_ = 0;
};

#endif

}  // namespace inlay::moe::cuda
