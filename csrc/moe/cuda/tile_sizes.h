// Sizes of the tiles of the Hopper kernels, and of their parts in shared memory.
#pragma once

namespace inlay::moe::cuda {

constexpr int kTileRows = 128, kTileColumns = 256;
constexpr int kTileDepth = 64;           // of a stage, which is summed over
constexpr int kPaddedUnit = 64;          // padded.unit of these kernels; half a tile's rows
constexpr int kMostTiledExperts = 1024;  // of these kernels

// Two warps fetch, two store results, and two groups of four multiply, each half of a tile's rows. No more: a product
// of 256 columns is not compiled for threads that have fewer than 154 registers.
constexpr int kGroups = 2;
constexpr int kFetchThreads = 64, kStoreWarps = 2;
constexpr int kTileThreads = kFetchThreads + kStoreWarps * 32 + kGroups * 128;

constexpr int kRowBytes = kTileRows * kTileDepth * 2, kBoxBytes = 64 * kTileDepth * 2;
constexpr int kBoxes = kTileColumns / 64;
constexpr int kStageBytes = kRowBytes + kBoxes * kBoxBytes;
constexpr int kStages = 3;

// Shared memory: the stages; rounded results of each group, [64, 64] for each box; control.
constexpr int kResultsAt = kStages * kStageBytes, kResultBytes = kBoxes * kBoxBytes;
constexpr int kControlAt = kResultsAt + kGroups * kResultBytes;

}  // namespace inlay::moe::cuda
