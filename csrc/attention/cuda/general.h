// The kernels that serve what the Hopper tiles do not: masks, biases, dropout, wide heads, float32, other GPUs.
//
// A block has some rows of one side (queries, or keys) in shared memory and passes over tiles of the other side. A warp
// keeps 256 bytes' worth of columns of its rows' results in registers (in float32: 128 columns of a 16-bit T, 64 of a
// float32 one). Where results are wider, neighbouring warps share their rows and have some of the columns each; they
// then compute a part of the depth of the scores each, and add these parts up through shared memory.
#pragma once

#include "attention/cuda/config.h"
#include "attention/params.h"

namespace inlay::attention::cuda {

// How a block's work is divided up, and its shared memory.
struct Division {
  int depth = 0, width = 0;  // pieces of the rows of q and k, and of v and o
  int warps = 0;
  int column_groups = 1;  // warps that share their rows
  int rows = 0;           // of the block
  int streamed = 0;       // rows of a tile of the other side: a multiple of 16
  int stages = 1;         // tiles of the other side that are in shared memory
  int stage_bytes = 0;    // of each
  int streamed_at = 0;    // where they begin
  int exchange_at = 0;    // where warps that share rows exchange scores
  int info_at = 0;        // what the block's threads know alike
  int shared_bytes = 0;
};

// From products to exponents: finish_scores() leaves scores, or, without any reason to touch them, products. Exponents
// of 2 are `factor` times as large, which is positive, and scores `unit` times.
//
// Scores may be as negative as floats can be, where eager code would hide keys. What is subtracted from them is
// therefore subtracted before they are multiplied.
struct ScoreRule {
  float factor, unit, inner, cap;
  bool inside;  // finish_scores() leaves scores

  explicit ScoreRule(const Inputs& in) {
    const float scale = static_cast<float>(in.scale);
    cap = static_cast<float>(in.softcap);
    inside = cap > 0.0f || in.bias.data || in.mask.data || !(scale > 0.0f);
    inner = cap > 0.0f ? scale / cap : scale;
    unit = inside ? 1.0f : scale;
    factor = kLog2E * unit;
  }
};

// Tiles of queries, seen from the keys: what the queries of a tile see together, and what each of them sees.
struct QueryTileRange {
  int lowest, highest;   // no query sees a key before `lowest` or from `highest` on; zeros: none sees any
  int all_from, all_to;  // each query of a whole tile sees these keys
};

// Of a query: what is subtracted from its scores (infinite where it sees no key, and all its probabilities are zero),
// and from the gradients of its probabilities.
struct RowValues {
  float lse;  // of scores; or already an exponent of 2, where those are computed from products at once
  float delta;
};

// Where the backward's scratch memory lies. `memory` may be null where only `bytes` is wanted.
struct GeneralScratch {
  RowValues* rows = nullptr;  // [B, Hq, Sq]
  QueryTileRange* ranges = nullptr;
  void* dout = nullptr;  // [B, Sq, Hq, DV] T: the gradient of o; null: it is that of y
  int64_t bytes = 0;

  GeneralScratch(const Inputs& in, int streamed_queries, void* memory) {
    char* const start = static_cast<char*>(memory);
    const auto take = [&](int64_t size) {
      char* const part = start + bytes;
      bytes += (size + 255) / 256 * 256;
      return part;
    };
    const int64_t heads = in.batch * in.queries.tokens * in.query_heads;
    rows = reinterpret_cast<RowValues*>(take(heads * static_cast<int64_t>(sizeof(RowValues))));
    ranges = reinterpret_cast<QueryTileRange*>(
        take(in.queries.chunk_bound(streamed_queries) * static_cast<int64_t>(sizeof(QueryTileRange))));
    if (in.gate.data) dout = take(heads * in.value_dim * size_of(in.q.dtype));
  }
};

// Instantiated in instantiations/.
template <typename T>
void general_forward(const ForwardParams& params, void* stream);
template <typename T>
void general_backward(const BackwardParams& params, void* stream);

// By T at run time; in general_launch.cu.
void general_forward(const ForwardParams& params, void* stream);
void general_backward(const BackwardParams& params, void* stream);
int64_t general_scratch_bytes(const BackwardParams& params);

// What the backward does before its products: RowValues, ranges, dgate, dsinks and the gradient of o.
void prepare_general_backward(const BackwardParams& params, int streamed_queries, const GeneralScratch& scratch,
                              void* stream);

}  // namespace inlay::attention::cuda
