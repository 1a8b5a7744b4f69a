// The walk back over a head's chunks, which carries the gradient of the state. With the names of chunk.cuh, G the
// gradient of the state after a chunk:
//
//   w = inverse^T (scores^T do + k_out * k G)      so that beta * w is the gradient of v
//   G <- exp(c_end) G + q^T (q_in * do) - k^T (k_in * beta * w)
//
// Transposed as in scan.cuh.
#pragma once

#include "gdn/cuda/scan.cuh"

namespace inlay::gdn::cuda {

struct ScanBackwardParams {
  ChunkParams chunk;
  TokenTensor dout;  // rows start at multiples of 16 bytes, or chunk.aligned is false
  StateTensor dfinal_state;
  StateTensor dinitial_state;
  OutputTensor dv;  // [B, T, Hv, V] T
  void* w;          // the same
  void* dstates;    // [chunk number][Hv][V, K] T, of the states after each chunk
};

// Starts c += or = x^T matrix.
template <typename T>
__device__ __forceinline__ void start_times(Accumulator (&c)[kTokens / 8], const Fragment (&x)[kTokens / 16],
                                            const TileView<T, kTokens, kTokens>& matrix, bool fresh) {
#pragma unroll
  for (int k = 0; k < kTokens / 16; ++k) {
    multiply_by_columns<kTokens / 8>(c, InRegisters{x}, k, matrix, k * 16, 0, fresh && k == 0);
  }
}

template <typename T, int kKeys, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 1) scan_backward_kernel(const __grid_constant__ ScanBackwardParams p) {
  using Memory = ScanMemory<T, kKeys, kWarps, Scan::outputs>;  // with do in place of v
  using Stage = ScanStage<T, kKeys, kWarps, Scan::outputs>;
  constexpr int kThreads = 32 * kWarps, kTokenTiles = kTokens / 8;
  const Inputs& in = p.chunk.inputs;
  const int keys = static_cast<int>(in.key_dim), values = static_cast<int>(in.value_dim);
  const int thread = threadIdx.x, warp = thread / 32;

  const int parts = (values + kWarps * kWarpColumns - 1) / (kWarps * kWarpColumns);
  const int64_t head_number = blockIdx.x / parts;
  const int block_column = static_cast<int>(blockIdx.x - head_number * parts) * kWarps * kWarpColumns;
  const int64_t sequence_number = head_number / in.value_heads, head = head_number % in.value_heads;
  const int64_t key_head = head / in.group();
  const int tile_column = warp * kWarpColumns, column = block_column + tile_column;
  wait_for_predecessor();
  release_successor();
  const Sequence sequence = in.sequences[sequence_number];
  const int64_t first_number = in.sequences.first_chunk(sequence_number, kChunk);
  const int64_t chunks = (sequence.end - sequence.begin + kChunk - 1) / kChunk;
  char* const memory = dynamic_shared();

  const auto chunk_of = [&](int64_t index) {
    const int64_t token = sequence.begin + index * kChunk;
    return Chunk{sequence_number, sequence.batch, token, static_cast<int>(min(sequence.end - token, kChunk))};
  };
  const auto unit_of = [&](int64_t index) { return (first_number + index) * in.value_heads + head; };
  const auto fetch = [&](int64_t index) {
    if (index >= 0) {
      const Stage stage(memory, index % Memory::kStages);
      const Chunk chunk = chunk_of(index);
      const int64_t unit = unit_of(index);
      const bool aligned = p.chunk.aligned;
      const Prepared& prepared = p.chunk.prepared;
      fetch_tile<kThreads>(stage.keys, rows_of<T>(in.k, chunk, key_head, keys, aligned), thread);
      fetch_tile<kThreads>(stage.queries, rows_of<T>(in.q, chunk, key_head, keys, aligned), thread);
      TileSource<T> dout = rows_of<T>(p.dout, chunk, head, values - block_column, aligned);
      dout.first += block_column;
      fetch_tile<kThreads>(stage.values, dout, thread);
      fetch_lower<kThreads>(stage.inverse, static_cast<const T*>(prepared.inverse) + unit * kMatrix, thread);
      fetch_lower<kThreads>(stage.scores, static_cast<const T*>(prepared.scores) + unit * kMatrix, thread);
      fetch_factors<kThreads>(stage.factors, prepared.factors + unit * (kFactors * kTokens), kLogDecay + 1, thread);
    }
    commit_copies();
  };

  StateColumns<kKeys> gradient;
  gradient.load(p.dfinal_state, p.dfinal_state.offset(sequence_number, head), keys, values, column);
  for (int i = 0; i < Memory::kStages; ++i) {
    clear_upper<kThreads>(Stage(memory, i).inverse, thread);
    clear_upper<kThreads>(Stage(memory, i).scores, thread);
  }
  fetch(chunks - 1);
  for (int64_t index = chunks - 1; index >= 0; --index) {
    fetch(index - 1);
    wait_for_copies<1>();
    publish_shared();
    __syncthreads();
    const Stage stage(memory, index % Memory::kStages);
    const Chunk chunk = chunk_of(index);

    Accumulator du[kTokenTiles];  // the gradient of u
    Fragment s[kKeys / 16];
    gradient.template round<T>(s);
    begin_products();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      multiply_by_rows<kTokenTiles>(du, InRegisters{s}, k, stage.keys, 0, k * 16, k == 0);
    }
    commit_products();
    gradient.template store_rows<T>(static_cast<T*>(p.dstates) + unit_of(index) * keys * values, s, keys, values,
                                    column);
    gradient.scale(expf(stage.factors[kLogDecay * kTokens + kTokens - 1]));
    Fragment dout[kTokens / 16], read[kTokens / 16];
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k) {
      stage.values.template load_columns_first<true>(dout[k], k * 16, tile_column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 query_in = factor_pair(stage.factors, kQueryIn, 2 * k + i / 2);
        float low, high;
        unpack_pair<T>(dout[k][i], low, high);
        read[k][i] = pack_pair<T>(low * query_in.x, high * query_in.y);
      }
    }
    wait_for_products<0>();
    keep(du);
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      const float2 key_out = factor_pair(stage.factors, kKeyOut, tile);
#pragma unroll
      for (int i = 0; i < 4; ++i) du[tile][i] *= i % 2 ? key_out.y : key_out.x;
    }
    begin_products();
    start_times(du, dout, stage.scores, false);
    commit_products();
    gradient.template start_adding<T>(read, stage.queries);
    commit_products();
    wait_for_products<1>();
    keep(du);
    Fragment x[kTokens / 16];
    const auto round_to_x = [&](const Accumulator(&c)[kTokenTiles], auto factor_of) {
#pragma unroll
      for (int k = 0; k < kTokens / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int tile = 2 * k + i / 2;
          const float2 factor = factor_of(tile);
          x[k][i] = pack_pair<T>(c[tile][i % 2 * 2] * factor.x, c[tile][i % 2 * 2 + 1] * factor.y);
        }
      }
    };
    const auto one = [](int) { return make_float2(1.0f, 1.0f); };
    round_to_x(du, one);
    Accumulator w[kTokenTiles];
    begin_products();
    start_times(w, x, stage.inverse, true);
    commit_products();
    wait_for_products<0>();
    keep(w);
    keep(gradient.tiles);
    Fragment erased[kTokens / 16];
    round_to_x(w, [&](int tile) {
      const float2 beta = factor_pair(stage.factors, kBeta, tile), key = factor_pair(stage.factors, kKeyIn, tile);
      return make_float2(-beta.x * key.x, -beta.y * key.y);
    });
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) erased[k][i] = x[k][i];
    }
    begin_products();
    gradient.template start_adding<T>(erased, stage.keys);
    commit_products();
    const auto store = [&](void* output) {
      store_columns<T>(stage.values, tile_column, x);
      store_token_rows<T>(static_cast<T*>(output), stage.values, tile_column, in, chunk, head, column);
    };
    round_to_x(w, one);
    store(p.w);
    round_to_x(w, [&](int tile) { return factor_pair(stage.factors, kBeta, tile); });
    store(p.dv.data);
    wait_for_products<0>();
    keep(gradient.tiles);
    __syncthreads();
  }
  if (p.dinitial_state.data) {
    gradient.store(p.dinitial_state, p.dinitial_state.offset(sequence_number, head), keys, values, column);
  }
}

}  // namespace inlay::gdn::cuda
