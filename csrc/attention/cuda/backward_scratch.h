// How the backward's scratch memory is divided up.
#pragma once

#include "attention/cuda/config.h"
#include "attention/cuda/scratch.h"

namespace inlay::attention::cuda {

// Tiles of queries of one head: of all batch rows' sequences, or, with packed sequences, a bound.
inline int64_t query_tiles(const Inputs& in, int64_t queries) {
  return in.queries.offsets ? in.queries.chunk_bound(queries) : divide_up(in.queries.tokens, queries);
}

// Each part at a multiple of 256 bytes from the start. `memory` may be null where only `bytes` is wanted.
struct BackwardScratch {
  // Of each head's rows, [B, Hq, Sq]: minus the logarithms of the denominators, of base 2 (minus infinity: no
  // probabilities), and delta.
  float* log_scales = nullptr;
  float* deltas = nullptr;
  float* dq = nullptr;        // sums, [B, Hq, tiles of queries, shape.dq_floats()], see backward.cuh
  unsigned* turns = nullptr;  // of each half of a tile, how many tiles of keys have added to it; null: in any order
  int64_t dq_floats = 0, turn_count = 0;
  // Inputs before their products, where tensor maps cannot describe what is given; dout also times sigmoid(gate).
  void* q = nullptr;
  void* k = nullptr;
  void* v = nullptr;
  void* dout = nullptr;
  int64_t bytes = 0;

  BackwardScratch(const BackwardParams& p, const BackwardShape& shape, void* memory) {
    const Inputs& in = p.inputs;
    char* const start = static_cast<char*>(memory);
    const auto take = [&](int64_t size) {
      char* const part = start + bytes;
      bytes += (size + 255) / 256 * 256;
      return part;
    };
    const auto copy = [&](const inlay::cuda::BoxedTensor& x, bool always) -> void* {
      if (!always && fits_tensor_map(x)) return nullptr;
      return take(x.batch * x.tokens * x.heads * x.columns * 2);
    };
    const int64_t rows = in.batch * in.query_heads * in.queries.tokens;
    const int64_t tiles = in.batch * in.query_heads * query_tiles(in, shape.queries);
    dq_floats = tiles * shape.dq_floats();
    turn_count = p.deterministic ? tiles * 2 : 0;
    log_scales = reinterpret_cast<float*>(take(rows * 4));
    deltas = reinterpret_cast<float*>(take(rows * 4));
    dq = reinterpret_cast<float*>(take(dq_floats * 4));
    if (p.deterministic) turns = reinterpret_cast<unsigned*>(take(turn_count * 4));
    q = copy(boxed(in.q, in, true, in.head_dim), false);
    k = copy(boxed(in.k, in, false, in.head_dim), false);
    v = copy(boxed(in.v, in, false, in.value_dim), false);
    dout = copy(boxed(p.dout, in, true, in.value_dim), in.gate.data != nullptr);
  }
};

}  // namespace inlay::attention::cuda
