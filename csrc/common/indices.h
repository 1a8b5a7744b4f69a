// Integer arguments in device memory: lengths, slots.
#pragma once

#include "common/rows.h"

namespace inlay {

// A dense input [size] of int32 or int64; null data: absent.
struct IndexTensor {
  const void* data = nullptr;
  int64_t size = 0;
  bool is_64_bit = false;

  INLAY_HOST_DEVICE int64_t operator[](int64_t i) const {
    return is_64_bit ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

}  // namespace inlay
