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

// The same with a third argument, the part of an `Accumulator` to add to.
template <class Vec, class Body>
INLAY_INLINE void sweep_in_parts(int64_t width, Body body) {
  constexpr int64_t step = Vec::lanes;
  int64_t i = 0;
  for (; i + 4 * step <= width; i += 4 * step) {
    body(i, Full{}, 0);
    body(i + step, Full{}, 1);
    body(i + 2 * step, Full{}, 2);
    body(i + 3 * step, Full{}, 3);
  }
  for (; i + step <= width; i += step) body(i, Full{}, 0);
  if (i < width) body(i, Partial{width - i}, 0);
}

// A sum over a row, in four parts: additions to one vector would each wait for the one before.
template <class Vec>
struct Accumulator {
  Vec parts[4] = {Vec::set(0), Vec::set(0), Vec::set(0), Vec::set(0)};

  INLAY_INLINE void add(Vec v, int part) { parts[part] = parts[part] + v; }
  INLAY_INLINE void add_product(Vec a, Vec b, int part) { parts[part] = fma(a, b, parts[part]); }
  INLAY_INLINE typename Vec::Scalar total() const { return sum((parts[0] + parts[1]) + (parts[2] + parts[3])); }
};

}  // namespace
}  // namespace inlay::cpu
