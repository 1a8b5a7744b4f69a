// The gated delta rule in chunks of 64 tokens, as matrix products of 16-bit values that are summed in float32.
//
// Per chunk and value head, with c the cumulated log decay, D_ij = exp(c_i - c_j) for i >= j and else 0, r the inverse
// lengths of q's and k's rows (1 unless they are normalised) and S the state before the chunk:
//
//   inverse = (1 + M)^-1          M_ij = beta_i r_i r_j <k_i, k_j> D_ij for i > j
//   scores_ij = scale r_i r_j <q_i, k_j> D_ij
//   u = inverse (beta (v - k_in * k S))              k_in_i = r_i exp(c_i)
//   o = q_in * q S + scores u                        q_in_i = scale r_i exp(c_i)
//   S <- exp(c_end) S + k^T (k_out * u)              k_out_i = r_i exp(c_end - c_i)
//
// Only the lines with S go from chunk to chunk. The matrices and factors are computed for all chunks at once before, by
// prepare_kernel; then scan_kernel walks over each head's chunks, its state in registers.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/tensor_map.cuh"
#include "common/cuda/tile.cuh"
#include "gdn/cuda/scratch.h"

namespace inlay::gdn::cuda {

using namespace inlay::cuda;

// exp of less is zero. Gates are held above it: then -inf leaves no NaN, and no large sum costs later differences their
// digits.
inline constexpr float kSmallestGate = -104.0f;
inline constexpr float kLog2E = 1.4426950408889634f;  // decays are powers of two from there on

inline constexpr int kWarpgroup = 128;

// Rows of a tensor [B, T, H, D] as boxes of 64 tokens by 64 columns.
struct TokenRows {
  CUtensorMap map;
};

struct ChunkParams {
  Inputs inputs;
  Prepared prepared;
  bool aligned;  // rows of all tensors [B, T, H, D] start at multiples of 16 bytes
  bool boxed;    // and can be fetched as boxes
  TokenRows q, k;
};

// One chunk of a sequence.
struct Chunk {
  int64_t batch;
  int64_t token;  // its first
  int tokens;     // at most kTokens; none: no chunk has this number
};

// The chunk of a number. Without a look at the offsets numbers have gaps (see Sequences), where this finds no tokens.
__device__ inline Chunk chunk_at(const Sequences& sequences, int64_t number) {
  int64_t low = 0;
  if (sequences.offsets) {
    int64_t high = sequences.count;  // the last sequence whose first chunk is not after `number`
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (sequences.first_chunk(middle, kChunk) <= number ? low : high) = middle;
    }
  } else {
    low = number / ((sequences.tokens + kChunk - 1) / kChunk);
  }
  const Sequence sequence = sequences[low];
  const int64_t token = sequence.begin + (number - sequences.first_chunk(low, kChunk)) * kChunk;
  const int64_t left = sequence.end - token;
  return {sequence.batch, token, token < sequence.begin || left <= 0 ? 0 : static_cast<int>(min(left, kChunk))};
}

template <typename T>
__device__ inline TileSource<T> rows_of(const TokenTensor& tensor, const Chunk& chunk, int64_t head, int columns,
                                        bool aligned) {
  const T* const first = static_cast<const T*>(tensor.data) + tensor.offset(chunk.batch, chunk.token, head);
  return {first, tensor.token_stride, chunk.tokens, columns, aligned};
}

// Whether the chunk's rows are fetched as boxes: whole chunks only, since a box would bring the next sequence's rows
// too.
__device__ __forceinline__ bool in_boxes(const ChunkParams& p, const Chunk& chunk) {
  return kHasTensorMaps && p.boxed && chunk.tokens == kTokens;
}

// A chunk's rows of a head, from `column` of `columns` on, to a tile: as boxes, which are waited for with the bytes
// that they are expected to have, or by all threads.
template <int kThreads, typename T, int kColumns>
__device__ __forceinline__ void fetch_rows(const TileView<T, kTokens, kColumns>& tile, const ChunkParams& p,
                                           const TokenTensor& tensor, const TokenRows& rows, const Chunk& chunk,
                                           int64_t head, int column, int columns, Barrier& barrier, unsigned thread) {
  if (!in_boxes(p, chunk)) {
    TileSource<T> source = rows_of<T>(tensor, chunk, head, columns - column, p.aligned);
    source.first += column;
    fetch_tile<kThreads>(tile, source, thread);
  } else if (thread == 0) {
#pragma unroll
    for (int panel = 0; panel < kColumns / 64; ++panel) {
      fetch_box(tile.base + panel * Tile<T, kTokens, kColumns>::kPanelBytes, rows.map, column + panel * 64,
                static_cast<int>(chunk.token), static_cast<int>(head), static_cast<int>(chunk.batch), barrier);
    }
  }
}

// Lane 4 g + t hands its word i to lane 4 g + i, which puts it at t.
__device__ inline void transpose_quad(Fragment& r) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const bool upper = t & step;
      const uint32_t sent = upper ? r[i] : r[i | step];
      const uint32_t received = __shfl_xor_sync(0xffffffffu, sent, step);
      (upper ? r[i] : r[i | step]) = received;
    }
  }
}

}  // namespace inlay::gdn::cuda
