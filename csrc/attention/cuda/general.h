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

// What a mask says of cells of kCell queries by kCell keys, found before the products: so that tiles of which it hides
// everything are not computed, and those of which it hides nothing do not read it. A byte a cell, of the mask's own
// sizes: bit 0 where some of it is seen, bit 1 where some of it is hidden. Rows of cells are padded to whole words.
constexpr int kCell = 16;
constexpr int kWordKeys = 4 * kCell;

struct MaskCells {
  uint32_t* words = nullptr;  // null: there is no mask, or nothing is known of it
  int64_t batch_stride = 0, head_stride = 0;
  int query_stride = 0, key_stride = 0;  // of words; 0 where the mask is broadcast
  int queries = 0, row_words = 0;        // sizes of what the mask is broadcast to
  int64_t bytes = 0;

  // With few queries the mask is not looked at often enough.
  MaskCells(const Inputs& in, void* memory) {
    constexpr int64_t kFewest = 4 * kCell;
    const ScoreTensor& mask = in.mask;
    if (!mask.data || in.queries.tokens < kFewest || in.keys.tokens == 0) return;
    words = static_cast<uint32_t*>(memory);
    queries = static_cast<int>((in.queries.tokens + kCell - 1) / kCell);
    row_words = static_cast<int>((in.keys.tokens + kWordKeys - 1) / kWordKeys);
    key_stride = mask.key_stride ? 1 : 0;
    const int64_t row = mask.key_stride ? row_words : 1;
    query_stride = mask.query_stride ? static_cast<int>(row) : 0;
    head_stride = row * (mask.query_stride ? queries : 1);
    batch_stride = head_stride * (mask.head_stride ? in.query_heads : 1);
    bytes = batch_stride * (mask.batch_stride ? in.batch : 1) * static_cast<int64_t>(sizeof(uint32_t));
    if (!mask.head_stride) head_stride = 0;
    if (!mask.batch_stride) batch_stride = 0;
  }
};

// Where the backward's scratch memory lies. `memory` may be null where only `bytes` is wanted.
struct GeneralScratch {
  RowValues* rows = nullptr;  // [B, Hq, Sq]
  QueryTileRange* ranges = nullptr;
  void* dout = nullptr;   // [B, Sq, Hq, DV] T: the gradient of o; null: it is that of y
  void* cells = nullptr;  // MaskCells
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
    cells = take(MaskCells(in, nullptr).bytes);
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
int64_t general_scratch_bytes(const ForwardParams& params);
int64_t general_scratch_bytes(const BackwardParams& params);

// Fills the cells, where there are any.
void find_mask_cells(const Inputs& in, const MaskCells& cells, void* stream);

// What the backward does before its products: RowValues, ranges, dgate, dsinks and the gradient of o.
void prepare_general_backward(const BackwardParams& params, int streamed_queries, const GeneralScratch& scratch,
                              void* stream);

}  // namespace inlay::attention::cuda
