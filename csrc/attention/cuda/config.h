// Shapes of the tiles that the kernels for 16-bit values work on.
#pragma once

namespace inlay::attention::cuda {

// What one block of the forward works on at a time. Each group is a warpgroup of 64 queries; another one fetches.
struct ForwardShape {
  int head_dim;      // the kernel's, of q and k; a tensor's may be smaller
  int value_dim;     // likewise
  int most_queries;  // of a sequence, on average; longer ones have another shape
  int groups;        // of 64 queries
  int keys;          // a tile of keys
  int key_stages;    // tiles of k in shared memory
  int value_stages;  // tiles of v
  int query_stages;  // tiles of q: with two, the next tile's comes early
  bool in_turns;     // a group starts its products after the one before it has
  bool bold;         // scores are compared with the first tile's largest alone, until they get out of hand

  constexpr int queries() const { return groups * 64; }
  constexpr int threads() const { return (groups + 1) * 128; }
  // Registers of a thread that fetches, and of one that computes; a block has 65536 for all.
  constexpr int few_registers() const { return groups == 3 ? 32 : head_dim > 192 ? 24 : 40; }
  constexpr int many_registers() const { return groups == 3 ? 160 : head_dim > 192 ? 240 : 232; }
};

constexpr float kLog2E = 1.4426950408889634f;

constexpr int kAnyLength = 0x7fffffff;

// In the order of their cost: the first one that is large enough serves. Measured on an H200 (bf16, 16k tokens, cycles
// under the profiler; the share of them in which the tensor cores work): `bold` takes d128 from 77 to 86 %, d64 from 57
// to 63 %, and leaves d256, which has few scores for its products, at 94 %; turns take d256 from 87 to 94 %, and cost
// bold shapes 1 to 2 %. Three groups read k and v from shared memory once for 192 queries, which pays for d64 from 2048
// queries on (513 against 464 TFLOP/s), but 1024 queries are not a multiple of 192 (causal 276 against 322).
inline constexpr ForwardShape kForwardShapes[] = {
    {32, 32, kAnyLength, 3, 128, 3, 3, 2, false, true},   {48, 40, kAnyLength, 3, 128, 3, 3, 2, false, true},
    {64, 64, 1024, 2, 128, 3, 3, 2, false, true},         {64, 64, kAnyLength, 3, 128, 3, 3, 2, false, true},
    {80, 80, kAnyLength, 2, 128, 3, 2, 1, false, true},   {96, 96, kAnyLength, 2, 128, 3, 2, 1, false, true},
    {128, 128, kAnyLength, 2, 128, 3, 2, 2, false, true}, {160, 160, kAnyLength, 2, 96, 2, 2, 1, true, true},
    {192, 128, kAnyLength, 2, 128, 2, 2, 1, true, true},  {192, 192, kAnyLength, 2, 96, 2, 2, 1, true, true},
    {256, 256, kAnyLength, 2, 80, 2, 2, 1, true, false},
};

// The number of the shape with these dimensions for sequences of this length.
constexpr int forward_shape(int head_dim, int value_dim, int queries = kAnyLength) {
  int i = 0;
  while (kForwardShapes[i].head_dim != head_dim || kForwardShapes[i].value_dim != value_dim ||
         kForwardShapes[i].most_queries < queries) {
    ++i;
  }
  return i;
}

// What one block of the backward works on: a tile of keys, and tile after tile of the queries that see some of them.
struct BackwardShape {
  int head_dim;   // the kernel's, of q and k; a tensor's may be smaller
  int value_dim;  // likewise
  int keys;       // 128: each of two warpgroups has half of them; 64: one has dv of all, the other dk
  int queries;    // a tile of them
  int stages;     // tiles of q and of the result's gradient in shared memory
  bool capped;    // for a softcap, which takes registers

  // dq's tiles are added up in halves, each by one warpgroup: of 64 queries, or of the columns.
  constexpr bool halves_are_columns() const { return queries == 64; }
  constexpr int half_columns() const { return halves_are_columns() ? (head_dim + 127) / 128 * 64 : 64; }
  constexpr int dq_floats() const { return 2 * 64 * half_columns(); }  // of a tile
};

// What was learnt on an H200 (bf16, 16k tokens, causal, TFLOP/s of the whole backward, within 4 % for the clock's
// sake). dq's sums are what limits: without adding them d128 has 648 instead of 555 and d256 675 instead of 445, and
// plain stores in place of reductions gain next to nothing, so it is the way to the L2 cache that is full, of 32 KiB
// for each tile of 64 queries and 128 keys. Reductions from registers and copies of sums by way of shared memory take
// as long. At d64 the time goes between the products: tiles of 128 queries have 440, of 64 queries 420, and products in
// flight while s is looked at do not fit in the registers. The sum of one group's dq in shared memory needs room that
// d256 does not have with two stages.
inline constexpr BackwardShape kBackwardShapes[] = {
    {64, 64, 128, 128, 2, false}, {96, 96, 128, 64, 2, false},  {128, 128, 128, 64, 2, false},
    {128, 128, 128, 64, 2, true}, {192, 128, 64, 64, 2, false}, {192, 192, 64, 64, 2, false},
    {256, 256, 64, 64, 2, false}, {256, 256, 64, 64, 2, true},
};

constexpr int backward_shape(int head_dim, int value_dim, bool capped = false) {
  int i = 0;
  while (kBackwardShapes[i].head_dim != head_dim || kBackwardShapes[i].value_dim != value_dim ||
         kBackwardShapes[i].capped != capped) {
    ++i;
  }
  return i;
}

}  // namespace inlay::attention::cuda
