// The sums over each token's slots, of the rows that were stored for them: of what experts gave, and of x's gradient.
#pragma once

#include "moe/params.h"

namespace inlay::moe::cuda {

// y = the sum of values, in the order of slots, times their weights, and sigmoid(shared_gate) * shared.
struct SlotSums {
  int64_t tokens = 0;
  int64_t slots = 0;
  int64_t hidden = 0;
  int64_t capacity = 0;             // rows of values
  const int32_t* places = nullptr;  // [T * K] of each slot its row, -1: none
  const void* values = nullptr;     // [capacity, H] in y's dtype
  VectorTensor weights;             // [T * K], or absent: ones
  RowTensor shared;                 // [T, H] in y's dtype, or absent
  VectorTensor shared_gate;         // [T], or absent
  OutputTensor y;                   // [T, H]
};

void sum_slots(const SlotSums& sums, void* stream);

}  // namespace inlay::moe::cuda
