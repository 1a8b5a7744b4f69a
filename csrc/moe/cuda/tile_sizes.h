// Sizes of the tiles of the Hopper kernels, and of their parts in shared memory.
#pragma once

namespace inlay::moe::cuda {

constexpr int kTileRows = 128, kTileColumns = 256;
constexpr int kPaddedUnit = 64;  // padded.unit of these kernels; half a tile's rows
constexpr int kBoxes = kTileColumns / 64;

// Two warps fetch, two store results, and two groups of four multiply, each half of a tile's rows. No more: a product
// of 256 columns is not compiled for threads that have fewer than 154 registers.
constexpr int kGroups = 2;
constexpr int kFetchThreads = 64, kStoreWarps = 2;
constexpr int kTileThreads = kFetchThreads + kStoreWarps * 32 + kGroups * 128;

// How far the warps that fetch may be ahead of those that store, in tiles.
constexpr int kTilesAhead = 4;

constexpr int kSquareBytes = 64 * 64 * 2;
constexpr int kResultBytes = kBoxes * kSquareBytes;  // of a group's rounded sums, a square for each box

// Shared memory: stages that have `kDepth` of what is summed over, each group's rounded sums, barriers. Tried on an
// H200: four stages of 64 and one place for the sums of both groups, no gain; six of 32 for the matrices' gradients, a
// tenth slower, since each stage costs those who fetch a fixed time.
template <int kDepth_>
struct TileMemory {
  static constexpr int kDepth = kDepth_;
  static constexpr int kStages = 192 / kDepth;
  static constexpr int kRowBytes = kTileRows * kDepth * 2, kBoxBytes = 64 * kDepth * 2;
  static constexpr int kStageBytes = kRowBytes + kBoxes * kBoxBytes;
  static constexpr int kResultsAt = kStages * kStageBytes;
  static constexpr int kControlAt = kResultsAt + kGroups * kResultBytes;
};

}  // namespace inlay::moe::cuda
