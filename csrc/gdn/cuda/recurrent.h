// The rule token by token, whatever asks for it.
#pragma once

#include "gdn/params.h"

namespace inlay::gdn::cuda {

struct RecurrentParams {
  Inputs inputs;
  OutputTensor o;      // [B, T, Hv, V]
  StateTensor before;  // absent: zeros
  StateTensor after;   // may be the same memory, or not wanted
  OutputTensor every;  // [B, T, Hv, K, V], the state after each token; or not wanted
  // Set by `recurrent`.
  bool aligned = false;  // all rows and states start at multiples of 16 bytes
  int64_t first_sequence = 0;
};

// Sequences of one launch: they are the third dimension of the grid, so that no block has to divide its number.
constexpr int64_t kMaxGridSequences = 65535;

void recurrent(RecurrentParams params, void* stream);

}  // namespace inlay::gdn::cuda
