// Which threads hold which part of a row, by width. Host-testable: no CUDA in here.
//
// Widths count 16-byte vectors: 8 elements of a 16-bit dtype, 4 of float32.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace inlay::norm::cuda {

// What a kernel reads beside x. One kernel each, because registers are what limits them.
enum class Role { plain, residual, gated };

struct Shape {
  int max_vectors;  // the widest row this shape holds in registers
  int group;        // threads sharing a row: part of a warp, a warp, or several
  int vectors;      // vectors of a row in each thread
  int threads;      // threads in a block
  int blocks;       // that must fit on a multiprocessor: caps the registers of a thread

  constexpr int groups() const { return threads / group; }
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

// Rows that a group of a resident grid has under way, the one being reduced included. Three were never faster.
inline constexpr int kStages = 2;

// Learnt on an H200: four vectors a thread from 1024 elements up, two below. Fewer leave too few bytes under way, more
// cost occupancy. The caps spill a few registers where the weight is float32, and are worth it all the same.
inline constexpr Shape kPlainForwardShapes[] = {
    {8, 4, 2, 128, 12},    {16, 8, 2, 128, 12},    {32, 16, 2, 128, 12},   {64, 32, 2, 128, 12},
    {128, 32, 4, 64, 16},  {256, 64, 4, 64, 16},   {384, 96, 4, 96, 10},   {512, 128, 4, 128, 8},
    {640, 128, 5, 128, 7}, {1024, 256, 4, 256, 4}, {2048, 512, 4, 512, 2}, {4096, 1024, 4, 1024, 1},
};
static_assert(is_valid(kPlainForwardShapes));

// A second tensor doubles the bytes under way: half the vectors, and no cap on the registers.
inline constexpr Shape kResidualForwardShapes[] = {
    {8, 8, 1, 256, 1},     {16, 16, 1, 256, 1},    {32, 32, 1, 256, 1},    {64, 32, 2, 128, 1},
    {128, 64, 2, 64, 1},   {256, 128, 2, 128, 1},  {384, 192, 2, 192, 1},  {512, 256, 2, 256, 1},
    {640, 320, 2, 320, 1}, {1024, 512, 2, 512, 1}, {2048, 512, 4, 512, 1}, {4096, 1024, 4, 1024, 1},
};
static_assert(is_valid(kResidualForwardShapes));

// A resident grid.
inline constexpr Shape kGatedForwardShapes[] = {
    {8, 4, 2, 128, 4},     {16, 8, 2, 128, 4},     {32, 16, 2, 128, 4},
    {64, 32, 2, 128, 4},   {128, 64, 2, 128, 4},   {256, 128, 2, 128, 4},
    {512, 256, 2, 256, 2}, {1024, 512, 2, 512, 1}, {2048, 1024, 2, 1024, 1},
};
static_assert(is_valid(kGatedForwardShapes));

template <Role kRole>
constexpr const auto& forward_shapes() {
  if constexpr (kRole == Role::residual) {
    return kResidualForwardShapes;
  } else if constexpr (kRole == Role::gated) {
    return kGatedForwardShapes;
  } else {
    return kPlainForwardShapes;
  }
}

// Learnt on an H200: two vectors a thread, and registers enough to keep the row in them between its two passes. Reading
// it from shared memory again to have more rows under way was slower; four vectors were up to a tenth slower, and one
// block of many threads a multiprocessor leaves the fewest partial sums.
inline constexpr Shape kBackwardShapes[] = {
    {8, 4, 2, 128, 4},     {16, 8, 2, 128, 4},     {32, 16, 2, 128, 4},    {64, 32, 2, 128, 4},
    {128, 64, 2, 512, 1},  {256, 128, 2, 640, 1},  {384, 192, 2, 576, 1},  {512, 256, 2, 512, 1},
    {640, 320, 2, 640, 1}, {1024, 512, 2, 512, 1}, {2048, 256, 8, 256, 1},
};
static_assert(is_valid(kBackwardShapes));

template <int Count>
constexpr int shape_index(const Shape (&shapes)[Count], int64_t vectors) {
  for (int i = 0; i < Count; ++i) {
    if (vectors <= shapes[i].max_vectors) return i;
  }
  return -1;  // wider than any: the general kernel reads such rows more than once
}

// Rows too few to fill the chip are spread over up to four times the threads: then latency counts, not occupancy.
// Blocks of 1024 threads start too slowly for that.
template <Role kRole>
constexpr int forward_shape(int64_t vectors, int64_t rows, int multiprocessors) {
  const auto& shapes = forward_shapes<kRole>();
  if (rows <= multiprocessors) {
    for (const int64_t spread : {4, 2}) {
      const int shape = shape_index(shapes, vectors * spread);
      if (shape >= 0 && shapes[shape].threads <= 512) return shape;
    }
  }
  return shape_index(shapes, vectors);
}

}  // namespace inlay::norm::cuda
