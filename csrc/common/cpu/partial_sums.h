// Sums over rows that many threads share: rows fall into groups, each group has sums of its own, and these are added in
// order. How many groups there are depends on the shape alone, so the threads have no say in the result.
#pragma once

#include "common/cpu/dispatch.h"

namespace inlay::cpu {
namespace {

constexpr int64_t kSumBlock = 64;  // columns that are added at a time

// The first row of a group; the sizes of groups differ by one at most.
INLAY_INLINE int64_t group_begin(int64_t rows, int64_t groups, int64_t group) {
  return rows / groups * group + smaller(group, rows % groups);
}

// totals[i] = the sum over the groups of partials[group * stride + i], for `count` columns.
template <class Scalar>
INLAY_INLINE void add_groups(const Scalar* partials, int64_t groups, int64_t stride, int64_t count,
                             Scalar (&totals)[kSumBlock]) {
  for (Scalar& total : totals) total = 0;
  for (int64_t group = 0; group < groups; ++group) {
    const Scalar* source = partials + group * stride;
    for (int64_t i = 0; i < count; ++i) totals[i] += source[i];
  }
}

}  // namespace
}  // namespace inlay::cpu
