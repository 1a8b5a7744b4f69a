// Which tokens belong together: one sequence for each batch row, or several packed into the only one.
#pragma once

#include "common/indices.h"

namespace inlay::conv {

// Tokens [begin, end) of one batch row. Positions before `begin` are those of the initial state.
struct Sequence {
  int64_t index = 0;
  int64_t begin = 0;
  int64_t end = 0;

  INLAY_HOST_DEVICE int64_t length() const { return end - begin; }
};

struct Sequences {
  IndexTensor boundaries;  // cu_seqlens, [count + 1]; absent: each batch row is one sequence
  int64_t count = 0;
  int64_t time = 0;  // tokens of a batch row

  // Whatever the boundaries say, nothing outside of [0, time) is touched: their values are checked on the CPU alone.
  INLAY_HOST_DEVICE int64_t boundary(int64_t i) const {
    const int64_t value = boundaries[i];
    return value < 0 ? 0 : value > time ? time : value;
  }

  // The batch row that holds a sequence.
  INLAY_HOST_DEVICE int64_t batch_of(int64_t index) const { return boundaries.data ? 0 : index; }

  INLAY_HOST_DEVICE Sequence operator[](int64_t index) const {
    if (!boundaries.data) return {index, 0, time};
    const int64_t begin = boundary(index);
    const int64_t end = boundary(index + 1);
    return {index, begin, end < begin ? begin : end};
  }

  // The sequence that token `t` of row `batch` belongs to: begin <= t < end.
  INLAY_HOST_DEVICE Sequence find(int64_t batch, int64_t t) const {
    if (!boundaries.data) return {batch, 0, time};
    int64_t low = 0;  // the first sequence that ends behind t, by bisection
    int64_t high = count - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (boundary(middle + 1) > t) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    const int64_t begin = boundary(low);
    const int64_t end = boundary(low + 1);
    return {low, begin < t ? begin : t, end > t ? end : time};
  }
};

}  // namespace inlay::conv
