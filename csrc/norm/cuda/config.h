// Which threads hold which part of a row, by width. Host-testable: no CUDA in here.
//
// Widths count 16-byte vectors: 8 elements of a 16-bit dtype, 4 of float32.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace inlay::norm::cuda {

struct Shape {
  int max_vectors;  // the widest row this shape holds in registers
  int group;        // threads sharing a row: part of a warp, a warp, or several
  int vectors;      // vectors of a row in each thread
  int threads;      // threads in a block
  int blocks;       // that must fit on a multiprocessor: caps the registers of a thread

  constexpr int rows_per_block() const { return threads / group; }
};

template <int Count>
constexpr bool is_valid(const Shape (&shapes)[Count]) {
  int previous = 0;
  for (const Shape& shape : shapes) {
    if (shape.max_vectors != shape.group * shape.vectors || shape.max_vectors <= previous) return false;
    if (shape.group > 32 ? shape.group % 32 != 0 : 32 % shape.group != 0) return false;
    if (shape.threads % shape.group != 0 || shape.threads * shape.blocks > 2048) return false;
    previous = shape.max_vectors;
  }
  return true;
}

// Learnt on an H200. Four vectors a thread beat two and eight from 1024 elements up, two beat one and four below: fewer
// leave too few bytes under way, more cost occupancy. Capping a plain norm at 64 registers helps.
// `blocks` is for norms that read x alone; those that also read a residual or a gate need more registers and are
// faster without a cap.
inline constexpr Shape kForwardShapes[] = {
    {8, 4, 2, 128, 8},      {16, 8, 2, 128, 8},     {32, 16, 2, 128, 8},      {64, 32, 2, 128, 8},
    {128, 32, 4, 128, 8},   {256, 64, 4, 64, 16},   {512, 128, 4, 128, 8},    {640, 160, 4, 160, 6},
    {1024, 256, 4, 256, 4}, {2048, 512, 4, 512, 2}, {4096, 1024, 4, 1024, 1},
};
static_assert(is_valid(kForwardShapes));

// Learnt on an H200. Two to four vectors a thread at two stages were the fastest; one or eight seldom. Shapes
// that win at 131072 rows do not all win at 16384: the start and the end of the resident grid and the partial sums
// weigh.
inline constexpr Shape kBackwardShapes[] = {
    {8, 4, 2, 128, 3},    {16, 8, 2, 128, 3},    {32, 16, 2, 128, 4},   {64, 32, 2, 128, 4},    {128, 32, 4, 128, 3},
    {256, 64, 4, 128, 3}, {512, 128, 4, 128, 3}, {640, 128, 5, 256, 1}, {1024, 256, 4, 256, 1}, {2048, 512, 4, 512, 1},
};
static_assert(is_valid(kBackwardShapes));

// Rows under way in each group of a backward block, the one being reduced included. More only costs occupancy.
inline constexpr int kBackwardStages = 2;

template <int Count>
constexpr int shape_index(const Shape (&shapes)[Count], int64_t vectors) {
  for (int i = 0; i < Count; ++i) {
    if (vectors <= shapes[i].max_vectors) return i;
  }
  return -1;  // wider than any: the general kernel reads such rows more than once
}

// Rows too few to fill the chip are spread over up to four times the threads: then latency counts, not occupancy.
// Blocks of 1024 threads start too slowly for that.
constexpr int forward_shape(int64_t vectors, int64_t rows, int multiprocessors) {
  if (rows <= multiprocessors) {
    for (const int64_t spread : {4, 2}) {
      const int shape = shape_index(kForwardShapes, vectors * spread);
      if (shape >= 0 && kForwardShapes[shape].threads <= 512) return shape;
    }
  }
  return shape_index(kForwardShapes, vectors);
}

}  // namespace inlay::norm::cuda
