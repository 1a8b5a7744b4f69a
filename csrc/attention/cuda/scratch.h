// How the forward's scratch memory is divided up.
#pragma once

#include "attention/params.h"
#include "common/cuda/tensor_map.h"

namespace inlay::attention::cuda {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline inlay::cuda::BoxedTensor boxed(const TokenTensor& tensor, const Inputs& in, bool of_queries, int64_t columns) {
  return {
      tensor,  in.batch, of_queries ? in.queries.tokens : in.keys.tokens, of_queries ? in.query_heads : in.key_heads,
      columns, 0};
}

// Each part at a multiple of 256 bytes from the start. `memory` may be null where only `bytes` is wanted.
struct ForwardScratch {
  unsigned* taken = nullptr;  // of TileOrder
  // Dense copies of inputs that tensor maps cannot describe; null: not needed.
  void* q = nullptr;
  void* k = nullptr;
  void* v = nullptr;
  int64_t bytes = 0;

  ForwardScratch(const Inputs& in, void* memory) {
    char* const start = static_cast<char*>(memory);
    const auto take = [&](int64_t size) {
      char* const part = start + bytes;
      bytes += (size + 255) / 256 * 256;
      return part;
    };
    const auto copy = [&](const inlay::cuda::BoxedTensor& x) -> void* {
      if (fits_tensor_map(x)) return nullptr;
      return take(x.batch * x.tokens * x.heads * x.columns * 2);
    };
    taken = reinterpret_cast<unsigned*>(take(sizeof(unsigned)));
    q = copy(boxed(in.q, in, true, in.head_dim));
    k = copy(boxed(in.k, in, false, in.head_dim));
    v = copy(boxed(in.v, in, false, in.value_dim));
  }
};

}  // namespace inlay::attention::cuda
