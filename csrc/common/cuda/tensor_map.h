// What the copy engine for tensors must be told of one: see tensor_map.cuh.
#pragma once

#include <cuda.h>

#include "common/sequences.h"

namespace inlay::cuda {

// What a tensor map is made of: [batch, tokens, heads, columns] of 16-bit values in boxes of `rows` tokens of one head
// by 64 columns, permuted as Tile does.
struct BoxedTensor {
  TokenTensor tensor;
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t heads = 0;
  int64_t columns = 0;
  int rows = 0;
};

// Whether the engine can read the tensor: it starts, and its rows start, at multiples of 16 bytes, and it is not
// expanded.
inline bool fits_tensor_map(const BoxedTensor& of) {
  const auto fits = [](int64_t size, int64_t stride) {
    return size <= 1 || (stride > 0 && stride % 8 == 0 && stride < (int64_t{1} << 39) && size < (int64_t{1} << 31));
  };
  const TokenTensor& x = of.tensor;
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && fits(of.batch, x.batch_stride) &&
         fits(of.tokens, x.token_stride) && fits(of.heads, x.head_stride);
}

CUtensorMap make_tensor_map(const BoxedTensor& tensor);

}  // namespace inlay::cuda
