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
  int key_stages;    // tiles of k in shared memory
  int value_stages;  // tiles of v
  int query_stages;  // tiles of q
  int turns;         // 0: none; 1: a group starts its products after the one before it has; 2: after it has its scores
  bool bold;         // scores are compared with the first tile's largest alone, until they get out of hand

  constexpr int queries() const { return groups * 64; }
  constexpr int threads() const { return (groups + 1) * 128; }
  // Registers of a thread that fetches, and of one that computes; a block has 65536 for all.
  constexpr int few_registers() const { return groups == 3 ? 32 : head_dim > 192 ? 24 : 40; }
  constexpr int many_registers() const { return groups == 3 ? 160 : head_dim > 192 ? 240 : 232; }
};

// In the order of their cost: the first whose dimensions are large enough serves.
inline constexpr ForwardShape kForwardShapes[] = {
    {32, 32, 3, 128, 3, 3, 2, 1, true},     {48, 40, 3, 128, 3, 3, 2, 1, true},
    {64, 64, 3, 128, 3, 3, 2, 1, true},     {80, 80, 2, 128, 3, 2, 2, 1, true},
    {96, 96, 2, 128, 3, 2, 2, 1, true},     {128, 128, 2, 128, 3, 2, 2, 1, true},
    {160, 160, 2, 96, 2, 2, 1, 1, false},   {192, 128, 2, 128, 2, 2, 1, 1, false},
    {192, 192, 2, 96, 2, 2, 1, 1, false},   {256, 256, 2, 80, 2, 2, 1, 1, false},
};

// The number of the shape with these dimensions.
constexpr int forward_shape(int head_dim, int value_dim) {
  int i = 0;
  while (kForwardShapes[i].head_dim != head_dim || kForwardShapes[i].value_dim != value_dim) ++i;
  return i;
}

}  // namespace inlay::attention::cuda
