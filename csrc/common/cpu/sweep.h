// Loops over the elements of a row.
#pragma once

#include "common/cpu/elements.h"

namespace inlay::cpu {
namespace {

// Calls body(i, lanes) for every vector of a row of `width` elements, from left to right.
template <class Vec, class Body>
INLAY_INLINE void sweep(int64_t width, Body body) {
  int64_t i = 0;
  for (; i + Vec::lanes <= width; i += Vec::lanes) body(i, Full{});
  if (i < width) body(i, Partial{width - i});
}

// A sum over a row. Additions to one vector would each wait for the one before, so there are four parts; and a long row
// is summed block by block, so that its rounding errors grow little with its width.
template <class Vec>
class Accumulator {
 public:
  INLAY_INLINE void add(Vec v, int part) { parts_[part] = parts_[part] + v; }
  INLAY_INLINE void add_product(Vec a, Vec b, int part) { parts_[part] = fma(a, b, parts_[part]); }
  INLAY_INLINE void end_block() {
    blocks_ = blocks_ + ((parts_[0] + parts_[1]) + (parts_[2] + parts_[3]));
    for (Vec& part : parts_) part = Vec::set(0);
  }
  INLAY_INLINE typename Vec::Scalar total() const { return sum(blocks_); }

 private:
  Vec parts_[4] = {Vec::set(0), Vec::set(0), Vec::set(0), Vec::set(0)};
  Vec blocks_ = Vec::set(0);
};

// As `sweep`, for bodies that add to accumulators: calls body(i, lanes, part) with the part to add to.
template <class Vec, class Body, class... Accumulators>
INLAY_INLINE void sweep_sums(int64_t width, Body body, Accumulators&... accumulators) {
  constexpr int64_t step = Vec::lanes;
  constexpr int64_t block = 256 * step;
  for (int64_t i = 0; i < width;) {
    const int64_t end = width - i < block ? width : i + block;
    for (; i + 4 * step <= end; i += 4 * step) {
      body(i, Full{}, 0);
      body(i + step, Full{}, 1);
      body(i + 2 * step, Full{}, 2);
      body(i + 3 * step, Full{}, 3);
    }
    for (; i + step <= end; i += step) body(i, Full{}, 0);
    if (i < end) {
      body(i, Partial{end - i}, 0);
      i = end;
    }
    (accumulators.end_block(), ...);
  }
}

}  // namespace
}  // namespace inlay::cpu
