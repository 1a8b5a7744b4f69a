// The gated delta rule token by token: a block for some columns of one head of one sequence, with the state in its
// registers (state_tile.cuh). Tokens come in batches, so that memory is waited for once a batch.
#pragma once

#include "common/cuda/launch.cuh"
#include "gdn/cuda/gates.cuh"
#include "gdn/cuda/recurrent.h"
#include "gdn/cuda/state_tile.cuh"

namespace inlay::gdn::cuda {

// Tokens of a batch, as many as shared memory takes without asking.
template <int kRows>
inline constexpr int kBatchTokens = kRows <= 8 ? 16 : 8;

template <int kRows, int kColumnLanes>
struct RecurrentShared : TileShared<kRows, kColumnLanes, kBatchTokens<kRows>> {
  float v[kBatchTokens<kRows>][kLaneColumns * kColumnLanes];
};

inline constexpr int kNarrow = 8;  // lanes of four columns: rows of 128 bytes of float32, what a cache line holds
inline constexpr int kWide = 32;   // and four times that, so that memory sees whole pages go by; for one batch, aligned

// Of a multiprocessor. Two wide ones, so that one moves its states while the other computes, in 64 registers a thread.
template <int kRows, int kColumnLanes>
inline constexpr int kRecurrentBlocks = kColumnLanes == kWide ? 2
                                        : kRows <= 8          ? 5
                                                              : 2;

template <typename T, int kRows, int kColumnLanes>
__global__ void __launch_bounds__(kColumnLanes* kGroups, kRecurrentBlocks<kRows, kColumnLanes>)
    recurrent_kernel(const __grid_constant__ RecurrentParams p) {
  using Tile = StateTile<kRows, kColumnLanes>;
  constexpr int kThreads = Tile::kThreads, kColumns = Tile::kColumns, kWarps = kThreads / 32;
  constexpr int kTokens = kBatchTokens<kRows>;
  __shared__ RecurrentShared<kRows, kColumnLanes> shared;
  const Inputs& inputs = p.inputs;
  const int keys = static_cast<int>(inputs.key_dim), values = static_cast<int>(inputs.value_dim);
  const int value_heads = static_cast<int>(inputs.value_heads), head = blockIdx.y;
  const int key_head = head / (value_heads / static_cast<int>(inputs.key_heads));
  const int first_column = static_cast<int>(blockIdx.x) * kColumns;
  const int64_t sequence_number = p.first_sequence + blockIdx.z;
  const int warp = threadIdx.x / 32;

  const bool aligned = kColumnLanes == kWide || p.aligned;
  Tile tile(keys, values, first_column, aligned);
  const int64_t before = p.before.offset(sequence_number, head);
  // Only blocks that can have started before their predecessor ended: for the others it would be work twice.
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  if (block < resident_blocks_bound(kThreads)) tile.prefetch(p.before.data, p.before.dtype, before);
  wait_for_predecessor();
  release_successor();
  tile.load(p.before.data, p.before.dtype, before);
  const Sequence sequence = inputs.sequences[sequence_number];

  const auto load_batch = [&](int64_t begin, int count) {
    // Different warps for each, so that their loads are under way at once where there is but one token.
    for (int i = threadIdx.x; i < count * kColumns; i += kThreads) {
      const int token = i / kColumns, column = first_column + i % kColumns;
      const T* const v = static_cast<const T*>(inputs.v.data) + inputs.v.offset(sequence.batch, begin + token, head);
      shared.v[token][i % kColumns] = column < values ? to_float(v[column]) : 0.0f;
    }
    const int own = static_cast<int>(threadIdx.x) - kColumns;
    if (own >= 0 && own < count) {
      const auto ask = [&](const TokenTensor& tensor) {
        return Pending(tensor.data, tensor.dtype, tensor.offset(sequence.batch, begin + own, head));
      };
      const Pending g = ask(inputs.g), beta = ask(inputs.beta);
      shared.decay[own] = expf(g.value());
      shared.beta[own] = beta.value();
    }
    const float scale = static_cast<float>(inputs.scale);
    for (int token = kWarps - 1 - warp; token < count; token += kWarps) {
      shared.prepare_keys(token, keys, scale, inputs.l2norm_qk, [&](int which, int piece, float (&row)[kPiece]) {
        const TokenTensor& tensor = which == 0 ? inputs.q : inputs.k;
        const T* const source = static_cast<const T*>(tensor.data) +
                                tensor.offset(sequence.batch, begin + token, key_head) + piece * kPiece;
        if (aligned) {
          unpack(load<T, kPiece>(source), row);
        } else {
#pragma unroll
          for (int i = 0; i < kPiece; ++i) row[i] = to_float(source[i]);
        }
      });
    }
    __syncthreads();
  };

  for (int64_t begin = sequence.begin;;) {
    const int count = static_cast<int>(sequence.end - begin < kTokens ? sequence.end - begin : kTokens);
    load_batch(begin, count);
    if (begin == sequence.begin) tile.widen(p.before.dtype);
    for (int token = 0; token < count; ++token) {
      const int64_t row = (sequence.batch * inputs.sequences.tokens + begin + token) * value_heads + head;
      tile.step(
          shared, token, [&](int column) { return shared.v[token][column]; },
          [&](int column, float o) {
            if (first_column + column >= values) return;
            static_cast<T*>(p.o.data)[row * values + first_column + column] = from_float<T>(o);
          });
      if (p.every.data) tile.store(p.every.data, p.every.dtype, row * keys * values);
    }
    begin += count;
    if (kColumnLanes == kWide || begin >= sequence.end) break;
    __syncthreads();  // the next batch overwrites what the last token read
  }
  if (p.after.data) tile.store(p.after.data, p.after.dtype, p.after.offset(sequence_number, head));
}

}  // namespace inlay::gdn::cuda
