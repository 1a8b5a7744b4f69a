// Whether memory may be accessed 16 bytes at a time.
#pragma once

#include <cstdint>

#include "gdn/params.h"

namespace inlay::gdn::cuda {

inline bool aligned_pointer(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// All rows of [B, T, H, D].
inline bool aligned_rows(const TokenTensor& tensor) {
  const int64_t elements = 16 / size_of(tensor.dtype);
  return aligned_pointer(tensor.data) && tensor.batch_stride % elements == 0 && tensor.token_stride % elements == 0 &&
         tensor.head_stride % elements == 0;
}

inline bool aligned_state(const StateTensor& state) {
  const int64_t elements = 16 / size_of(state.dtype);
  return aligned_pointer(state.data) && state.sequence_stride % elements == 0 && state.head_stride % elements == 0;
}

}  // namespace inlay::gdn::cuda
