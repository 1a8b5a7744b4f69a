// The rule token by token, whatever asks for it.
#pragma once

#include "gdn/params.h"

namespace inlay::gdn::cuda {

struct RecurrentParams {
  Inputs inputs;
  OutputTensor o;        // [B, T, Hv, V]
  StateTensor before;    // absent: zeros
  StateTensor after;     // may be the same memory, or not wanted
  OutputTensor every;    // [B, T, Hv, K, V], the state after each token; or not wanted
  bool aligned = false;  // set by `recurrent`: all rows and states start at multiples of 16 bytes
};

void recurrent(RecurrentParams params, void* stream);

bool is_aligned(const void* data);
bool is_aligned(const StateTensor& state);

}  // namespace inlay::gdn::cuda
