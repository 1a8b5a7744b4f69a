// What the attention kernels of one instruction set offer; launch.cpp chooses among these tables and deals out the
// work.
#pragma once

#include "attention/params.h"
#include "common/cpu/elements.h"

namespace inlay::attention {

// Queries [begin, begin + count) of a sequence, for the query heads of one key head.
struct QueryTask {
  int64_t sequence = 0;
  int64_t key_head = 0;
  int64_t begin = 0;
  int64_t count = 0;
};

// One block of keys of a sequence, for one key head: from key block * backward_block() on.
struct KeyTask {
  int64_t sequence = 0;
  int64_t key_head = 0;
  int64_t block = 0;
};

// Elements [begin, end) of a bias's gradient along each dimension, of which those that the bias has one of are whole.
struct BiasTask {
  int64_t begin[4] = {0, 0, 0, 0};
  int64_t end[4] = {0, 0, 0, 0};
};

// Sizes of blocks, for which a core's second-level cache has room: as wide heads are, so few rows. A row is a query and
// a head. They are functions of the widths alone: neither what else is in the batch nor the number of threads has a say
// in the order of sums.
constexpr int64_t kForwardKeys = 128;  // keys that are packed at a time
constexpr int64_t kBiasQueries = 64;

INLAY_INLINE int64_t forward_rows(const Inputs& inputs) {
  const int64_t width = inputs.head_dim + inputs.value_dim;
  return width <= 128 ? 384 : width <= 256 ? 192 : width <= 512 ? 96 : 48;
}

// Rows and keys alike.
INLAY_INLINE int64_t backward_block(const Inputs& inputs) {
  const int64_t width = inputs.head_dim + inputs.value_dim;
  return width <= 128 ? 144 : width <= 256 ? 96 : 48;
}

// How many queries of all heads of a group make up to `rows` rows.
INLAY_INLINE int64_t queries_of(int64_t rows, int64_t group) { return rows >= group ? rows / group : 1; }

// Queries of a tile of the backward.
INLAY_INLINE int64_t backward_queries(const Inputs& inputs) {
  return queries_of(backward_block(inputs), inputs.group());
}

// What the queries of a tile may see together: every key that any of them sees is in `any`.
struct TileKeys {
  KeyRange any;
  KeyRange all;  // keys that each of them sees, as far as positions say
};

// The backward's scratch memory. Rows of q, dout and dq lie in the order of scratch_row(), in whole vectors: each block
// of keys passes over them, so what is done to them is done once, and not by each.
struct BackwardScratch {
  void* delta = nullptr;        // wide [B, Hq, Sq]: what is taken from the gradient of every probability of a row
  void* q = nullptr;            // wide, times the scale
  void* dout = nullptr;         // wide, of o: times the gate's sigmoid where there is a gate
  void* dq = nullptr;           // wide, not yet times the scale
  TileKeys* tiles = nullptr;    // of each tile of backward_queries()
  int32_t* finished = nullptr;  // of each tile and key head: how many blocks of keys have added their part to dq
};

// `memory`: one thread's own, aligned to kLineBytes, of as many bytes as `memory_bytes` says.
struct Kernels {
  void (*forward)(const ForwardParams& p, const QueryTask& task, void* memory);
  // delta, q, dout and dgate of tokens [begin, end) of all B * Sq.
  void (*prepare)(const BackwardParams& p, const BackwardScratch& scratch, int64_t begin, int64_t end);
  // dk and dv of the block, and its part of dq. Waits for the tile's earlier blocks, so tasks are to be started in
  // the order of their blocks.
  void (*backward)(const BackwardParams& p, const BackwardScratch& scratch, const KeyTask& task, void* memory);
  void (*store_dq)(const BackwardParams& p, const BackwardScratch& scratch, const QueryTask& task);
  void (*bias_gradient)(const BackwardParams& p, const BackwardScratch& scratch, const BiasTask& task, void* memory);
  void (*sink_gradient)(const BackwardParams& p, const BackwardScratch& scratch, int64_t head);
  int64_t (*forward_bytes)(const Inputs& inputs);
  int64_t (*backward_bytes)(const Inputs& inputs);
};

// The number of the row for the first head of the group. The group's others follow, then the next token's.
INLAY_INLINE int64_t scratch_row(const Inputs& inputs, int64_t batch, int64_t key_head, int64_t token) {
  return ((batch * inputs.key_heads + key_head) * inputs.queries.tokens + token) * inputs.group();
}

extern const Kernels kGenericKernels;
extern const Kernels kGenericF64Kernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;

}  // namespace inlay::attention
