// How the tokens are shared out among threads. Host-testable: no CUDA in here.
#pragma once

#include <cstdint>

namespace inlay::conv::cuda {

inline constexpr int kThreads = 128;  // in a block
inline constexpr int kWarp = 32;
// On a multiprocessor. Said aloud it lets a thread have the registers it asks for: left to itself the compiler spills a
// few to fit one block more.
inline constexpr int kMinBlocks = 1;
// The same for the backward with the channels innermost: as many as it fits in without spilling.
template <typename T>
inline constexpr int kBackwardMinBlocks = sizeof(T) == 2 ? 4 : 3;

// The widths that have kernels of their own; others take the general one.
inline constexpr int64_t kMinFastWidth = 2;
inline constexpr int64_t kMaxFastWidth = 4;

// Tokens whose loads are under way at once in each thread.
inline constexpr int kForwardStep = 8;
inline constexpr int kBackwardStep = 4;

// Channels of a thread. The forward takes 16 bytes; in the backward that many would need most of the registers there
// are, and 8 bytes of 16-bit elements keep twice the threads on the chip.
inline constexpr int kBackwardLanes = 4;

// How often the grid fills the chip. Sums over tokens cost a row of memory for each group of them, so that the backward
// fills it once.
inline constexpr int64_t kForwardWaves = 2;
inline constexpr int64_t kBackwardWaves = 1;

// Fewer tokens are not worth a thread that must load weights and the inputs before them.
inline constexpr int64_t kMinTile = 8;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Each batch row is cut into `tiles` tiles, the tiles of all rows are numbered through, and each group of threads works
// on `tiles_per_group` of them, one after another.
struct Tiling {
  int64_t tile = 1;   // tokens
  int64_t tiles = 0;  // of a batch row
  int64_t all_tiles = 0;
  int64_t tiles_per_group = 1;
  int64_t groups = 0;
};

// About `wanted` groups over batch rows of `time` tokens, in tiles that are multiples of `unit`.
constexpr Tiling tiling(int64_t batch, int64_t time, int64_t unit, int64_t wanted) {
  if (batch == 0 || time == 0) return {};
  const int64_t groups = wanted > 1 ? wanted : 1;
  const int64_t tiles_of_row = ceil_div(groups, batch);
  Tiling result;
  result.tile = ceil_div(ceil_div(time, tiles_of_row), unit) * unit;
  result.tiles = ceil_div(time, result.tile);
  result.all_tiles = batch * result.tiles;
  result.tiles_per_group = ceil_div(result.all_tiles, groups);
  result.groups = ceil_div(result.all_tiles, result.tiles_per_group);
  return result;
}

static_assert(tiling(1, 8192, kMinTile, 80).groups == 79);
static_assert(tiling(1, 8192, kMinTile, 80).tile == 104);
static_assert(tiling(3, 5, kMinTile, 80).groups == 3);
static_assert(tiling(1000, 5, kMinTile, 80).tiles_per_group == 13);
static_assert(tiling(0, 5, kMinTile, 80).groups == 0);

}  // namespace inlay::conv::cuda
