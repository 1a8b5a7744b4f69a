// Tensors [B, T, H, ...] of tokens, and sequences packed into one batch row: what kernels over tokens need to know.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/rows.h"

namespace inlay {

// An input [B, T, H, D] with a dense last dimension, or [B, T, H]; strides in elements; null data: absent.
struct TokenTensor {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t batch_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;

  INLAY_HOST_DEVICE int64_t offset(int64_t batch, int64_t token, int64_t head) const {
    return batch * batch_stride + token * token_stride + head * head_stride;
  }
};

// Where one sequence lies in tensors [B, T, H, ...].
struct Sequence {
  int64_t batch = 0;
  int64_t begin = 0;  // first token
  int64_t end = 0;    // one past the last
};

// The sequences of a batch: one a batch row, or those that `offsets` marks off in the only row. The chunks of all
// sequences are numbered through, with room for a partial one at each end: chunk numbers, and the memory that is
// allocated for chunks, need no look at the offsets.
struct Sequences {
  const void* offsets = nullptr;  // [count + 1] cumulative lengths; null: one sequence a batch row
  bool offsets_are_64_bit = false;
  int64_t count = 0;
  int64_t tokens = 0;  // of a batch row

  INLAY_HOST_DEVICE int64_t raw_offset(int64_t i) const {
    return offsets_are_64_bit ? static_cast<const int64_t*>(offsets)[i] : static_cast<const int32_t*>(offsets)[i];
  }

  // Offsets that are out of range or decrease are held within the row, so that nothing is read out of bounds.
  INLAY_HOST_DEVICE Sequence operator[](int64_t i) const {
    if (!offsets) return {i, 0, tokens};
    const int64_t first = raw_offset(i);
    const int64_t last = raw_offset(i + 1);
    const int64_t begin = first < 0 ? 0 : first > tokens ? tokens : first;
    const int64_t end = last < begin ? begin : last > tokens ? tokens : last;
    return {0, begin, end};
  }

  // The number of the sequence's first chunk; its others follow.
  INLAY_HOST_DEVICE int64_t first_chunk(int64_t i, int64_t chunk) const {
    if (!offsets) return i * ((tokens + chunk - 1) / chunk);
    return (*this)[i].begin / chunk + i;
  }

  // All chunk numbers are below this.
  INLAY_HOST_DEVICE int64_t chunk_bound(int64_t chunk) const {
    return offsets ? tokens / chunk + count : count * ((tokens + chunk - 1) / chunk);
  }
};

}  // namespace inlay
