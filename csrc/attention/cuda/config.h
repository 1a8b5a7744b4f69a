// Shapes of the tiles that the kernels for 16-bit values work on.
#pragma once

#include "common/cuda/launch.cuh"

namespace inlay::attention::cuda {

// What one block of the forward works on at a time. Each group is a warpgroup of 64 queries; another one fetches.
struct ForwardShape {
  int head_dim;   // the kernel's, of q and k; a tensor's may be smaller
  int value_dim;  // likewise
  int groups;     // of 64 queries
  int keys;       // a tile of keys
  int stages;     // tiles of k, and of v, in shared memory
  bool in_turns;  // the groups take turns in using the tensor cores

  constexpr int queries() const { return groups * 64; }
  constexpr int threads() const { return (groups + 1) * 128; }
  // Registers of a thread that fetches, and of one that computes; a block has 65536 for all.
  constexpr int few_registers() const { return groups == 3 ? 32 : head_dim > 192 ? 24 : 40; }
  constexpr int many_registers() const { return groups == 3 ? 160 : head_dim > 192 ? 240 : 232; }
};

// In the order of their cost: the first whose dimensions are large enough serves.
inline constexpr ForwardShape kForwardShapes[] = {
    {32, 32, 3, 128, 4, true},    {48, 40, 3, 128, 3, true},    {64, 64, 3, 128, 3, true},
    {80, 80, 2, 128, 2, true},    {96, 96, 2, 128, 2, true},    {128, 128, 2, 128, 2, true},
    {160, 160, 2, 96, 2, false},  {192, 128, 2, 128, 2, false}, {192, 192, 2, 96, 2, false},
    {256, 256, 2, 80, 2, false},
};

}  // namespace inlay::attention::cuda
