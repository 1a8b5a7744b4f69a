// Which threads hold which part of a head, by width, and which blocks work on q and which on k. Host-testable: no CUDA
// in here.
//
// Widths count 16-byte vectors: 8 elements of a 16-bit dtype, 4 of float32. A thread holds two vectors of a head: both
// partners where channels are rotated in halves.
#pragma once

#include <cstdint>

#include "common/rows.h"

namespace inlay::rope::cuda {

struct Shape {
  int group;    // threads sharing a head: part of a warp or a warp
  int heads;    // of a token, that a thread has under way together
  int threads;  // in a block
  int blocks;   // that must fit on a multiprocessor: caps the registers of a thread

  constexpr int groups() const { return threads / group; }
  constexpr int warps() const { return threads / 32; }
  constexpr int heads_of_warp() const { return 32 / group * heads; }
  constexpr int max_vectors() const { return 2 * group; }

  // Warps that work on one token's heads.
  constexpr int64_t warps_for(int64_t count) const { return (count + heads_of_warp() - 1) / heads_of_warp(); }
};

template <int Count>
constexpr bool is_valid(const Shape (&shapes)[Count]) {
  int previous = 0;
  for (const Shape& shape : shapes) {
    if (shape.group <= previous || 32 % shape.group != 0 || shape.threads % 32 != 0) return false;
    if (shape.threads * shape.blocks > 2048) return false;
    previous = shape.group;
  }
  return true;
}

// A warp works on one token: what its threads have of cos, sin and the weights serves all their heads. Four heads a
// thread keep 128 bytes under way for each.
inline constexpr Shape kForwardShapes[] = {{4, 4, 128, 4}, {8, 4, 128, 4}, {16, 4, 128, 4}, {32, 4, 128, 4}};
static_assert(is_valid(kForwardShapes));

// A resident grid, so that there are few partial sums of the weights' gradients. A warp's next heads are on their way
// into shared memory while it works on these.
inline constexpr Shape kBackwardShapes[] = {{4, 2, 128, 4}, {8, 2, 128, 4}, {16, 2, 128, 4}, {32, 2, 128, 3}};
static_assert(is_valid(kBackwardShapes));

inline constexpr int kStages = 2;  // the heads worked on, and the next

template <int Count>
constexpr int shape_index(const Shape (&shapes)[Count], int64_t vectors) {
  for (int i = 0; i < Count; ++i) {
    if (vectors <= shapes[i].max_vectors()) return i;
  }
  return -1;  // wider than any
}

// How many of the backward's blocks, two at least, work on q, the others on k: by their shares of a token's heads, but
// one each, as one without heads still has sums to write. So many heads of a token are worked on at a time.
INLAY_HOST_DEVICE inline int64_t blocks_of_q(int64_t blocks, int64_t q_heads, int64_t k_heads, int64_t at_a_time) {
  const int64_t q_turns = (q_heads + at_a_time - 1) / at_a_time;
  const int64_t k_turns = (k_heads + at_a_time - 1) / at_a_time;
  const int64_t turns = q_turns + k_turns > 0 ? q_turns + k_turns : 1;
  const int64_t share = (blocks * q_turns + turns / 2) / turns;
  return share < 1 ? 1 : share < blocks ? share : blocks - 1;
}

}  // namespace inlay::rope::cuda
