// The walk over a head's chunks: see chunk.cuh for the formulas.
//
// Everything is transposed, so that four warps have 64 of the state's columns, as rows, from the first chunk to the last
// in registers, and what one product gives is an operand of the next. Columns do not see each other: warps share the
// chunk's tiles, and exchange nothing.
#pragma once

#include "gdn/cuda/chunk.cuh"
#include "gdn/cuda/state.cuh"

namespace inlay::gdn::cuda {

inline constexpr int kWarpColumns = 16;

struct ScanParams {
  ChunkParams chunk;
  StateTensor final_state;  // or not wanted
  OutputTensor o;           // [B, T, Hv, V] T; for the states: u
  void* states;             // [chunk number][Hv][V, K] T, those before each chunk: for the backward
};

enum class Scan { outputs, states };

template <typename T, int kKeys, int kWarps, Scan kScan>
struct ScanMemory {
  static constexpr int kStages = 2;
  static constexpr int kValueColumns = kWarps * kWarpColumns;
  static constexpr int kFactorBytes = (kLogDecay + 1) * kTokens * 4;
  using Rows = Tile<T, kTokens, kKeys>;
  using Values = Tile<T, kTokens, kValueColumns>;
  using Matrix = Tile<T, kTokens, kTokens>;
  static constexpr bool kOutputs = kScan == Scan::outputs;
  static constexpr int kQueries = Rows::kBytes;
  static constexpr int kInverse = kQueries + (kOutputs ? Rows::kBytes : 0);
  static constexpr int kScores = kInverse + Matrix::kBytes;
  static constexpr int kValues = kScores + (kOutputs ? Matrix::kBytes : 0);
  static constexpr int kFactorRows = kValues + Values::kBytes;
  static constexpr int kStageBytes = (kFactorRows + kFactorBytes + 1023) / 1024 * 1024;
  static constexpr int kBytes = kStages * kStageBytes;
};

// One stage's tiles.
template <typename T, int kKeys, int kWarps, Scan kScan>
struct ScanStage {
  using Memory = ScanMemory<T, kKeys, kWarps, kScan>;
  TileView<T, kTokens, kKeys> keys, queries;
  TileView<T, kTokens, kTokens> inverse, scores;
  TileView<T, kTokens, Memory::kValueColumns> values;
  const float* factors;

  __device__ ScanStage(char* memory, int stage) {
    char* const first = memory + stage * Memory::kStageBytes;
    const uint32_t base = shared_address(first);
    keys.base = base;
    queries.base = base + Memory::kQueries;
    inverse.base = base + Memory::kInverse;
    scores.base = base + Memory::kScores;
    values.base = base + Memory::kValues;
    factors = reinterpret_cast<const float*>(first + Memory::kFactorRows);
  }
};

// The blocks of a [kTokens, kTokens] matrix on and below its diagonal.
template <int kThreads, typename T>
__device__ inline void fetch_lower(TileView<T, kTokens, kTokens> tile, const T* source, unsigned thread) {
  constexpr unsigned kRowStep = kThreads / 8;
  const unsigned column = thread % 8 * 8;
#pragma unroll 4
  for (unsigned row = thread / 8; row < kTokens; row += kRowStep) {
    if (column / 16 <= row / 16) copy_async_or_zero(tile.address(row, column), source + row * kTokens + column, true);
  }
}

// Their zeros above it, which no fetch touches.
template <int kThreads, typename T>
__device__ inline void clear_upper(TileView<T, kTokens, kTokens> tile, unsigned thread) {
  for (unsigned i = thread; i < kTokens * 8; i += kThreads) {
    const unsigned row = i / 8, column = i % 8 * 8;
    if (column / 16 > row / 16) store_shared(tile.address(row, column), uint4{0, 0, 0, 0});
  }
}

template <int kThreads>
__device__ inline void fetch_factors(const float* shared, const float* source, int rows, unsigned thread) {
  for (unsigned i = thread; i < rows * kTokens / 4; i += kThreads) {
    copy_async_or_zero(shared_address(shared) + i * 16, source + i * 4, true);
  }
}

// A factor of the two tokens that a lane has of a tile of eight.
__device__ inline float2 factor_pair(const float* factors, Factor factor, int tile) {
  return *reinterpret_cast<const float2*>(&factors[factor * kTokens + tile * 8 + threadIdx.x % 4 * 2]);
}

// A warp's 16 columns of a tile to their place, `column`, in the chunk's rows of a dense [B, T, Hv, V]: 32 bytes a row.
template <typename T, int kColumns>
__device__ inline void store_token_rows(T* output, const TileView<T, kTokens, kColumns>& tile, int tile_column,
                                        const Inputs& in, const Chunk& chunk, int64_t head, int column) {
  const int lane = threadIdx.x % 32, part = lane % 2 * 8;
  T* const first = output + ((chunk.batch * in.sequences.tokens + chunk.token) * in.value_heads + head) * in.value_dim;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = i * 16 + lane / 2;
    const uint4 piece = load_shared(tile.address(row, tile_column + part));
    if (row < chunk.tokens && column + part < in.value_dim) {
      *reinterpret_cast<uint4*>(first + row * in.value_heads * in.value_dim + column + part) = piece;
    }
  }
}

// Starts c += or = x^T matrix^T. The zeros above the diagonal are multiplied too: parts of c as operands of their own
// make the compiler wait after each product.
template <typename T>
__device__ __forceinline__ void start_times_transposed(Accumulator (&c)[kTokens / 8], const Fragment (&x)[kTokens / 16],
                                                       const TileView<T, kTokens, kTokens>& matrix, bool fresh) {
#pragma unroll
  for (int k = 0; k < kTokens / 16; ++k) {
    multiply_by_rows<kTokens / 8>(c, InRegisters{x}, k, matrix, 0, k * 16, fresh && k == 0);
  }
}

template <typename T, int kKeys, int kWarps, Scan kScan>
__global__ void __launch_bounds__(32 * kWarps, 1) scan_kernel(const __grid_constant__ ScanParams p) {
  using Memory = ScanMemory<T, kKeys, kWarps, kScan>;
  using Stage = ScanStage<T, kKeys, kWarps, kScan>;
  constexpr int kThreads = 32 * kWarps, kTokenTiles = kTokens / 8;
  constexpr bool kOutputs = kScan == Scan::outputs;
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
    if (index < chunks) {
      const Stage stage(memory, index % Memory::kStages);
      const Chunk chunk = chunk_of(index);
      const int64_t unit = unit_of(index);
      const bool aligned = p.chunk.aligned;
      const Prepared& prepared = p.chunk.prepared;
      fetch_tile<kThreads>(stage.keys, rows_of<T>(in.k, chunk, key_head, keys, aligned), thread);
      TileSource<T> v = rows_of<T>(in.v, chunk, head, values - block_column, aligned);
      v.first += block_column;
      fetch_tile<kThreads>(stage.values, v, thread);
      fetch_lower<kThreads>(stage.inverse, static_cast<const T*>(prepared.inverse) + unit * kMatrix, thread);
      if constexpr (kOutputs) {
        fetch_tile<kThreads>(stage.queries, rows_of<T>(in.q, chunk, key_head, keys, aligned), thread);
        fetch_lower<kThreads>(stage.scores, static_cast<const T*>(prepared.scores) + unit * kMatrix, thread);
      }
      fetch_factors<kThreads>(stage.factors, prepared.factors + unit * (kFactors * kTokens), kLogDecay + 1, thread);
    }
    commit_copies();
  };

  StateColumns<kKeys> state;  // of S^T: rows are columns of S
  state.load(in.initial_state, in.initial_state.offset(sequence_number, head), keys, values, column);
  for (int i = 0; i < Memory::kStages; ++i) {
    clear_upper<kThreads>(Stage(memory, i).inverse, thread);
    if constexpr (kOutputs) clear_upper<kThreads>(Stage(memory, i).scores, thread);
  }
  fetch(0);
  for (int64_t index = 0; index < chunks; ++index) {
    fetch(index + 1);
    wait_for_copies<1>();
    publish_shared();
    __syncthreads();
    const Stage stage(memory, index % Memory::kStages);
    const Chunk chunk = chunk_of(index);

    Fragment s[kKeys / 16];
    state.template round<T>(s);
    Accumulator read[kTokenTiles], o[kTokenTiles];
    begin_products();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      multiply_by_rows<kTokenTiles>(read, InRegisters{s}, k, stage.keys, 0, k * 16, k == 0);
    }
    commit_products();
    if constexpr (kOutputs) {
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k) {
        multiply_by_rows<kTokenTiles>(o, InRegisters{s}, k, stage.queries, 0, k * 16, k == 0);
      }
      commit_products();
    } else {
      state.template store_rows<T>(static_cast<T*>(p.states) + unit_of(index) * keys * values, s, keys, values, column);
    }
    wait_for_products<kOutputs ? 1 : 0>();
    keep(read);
    Fragment u[kTokens / 16];  // first the right side of the system
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k) {
      Fragment v;
      stage.values.template load_columns_first<true>(v, k * 16, tile_column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int tile = 2 * k + i / 2;
        const float2 key_in = factor_pair(stage.factors, kKeyIn, tile), beta = factor_pair(stage.factors, kBeta, tile);
        float low, high;
        unpack_pair<T>(v[i], low, high);
        u[k][i] = pack_pair<T>(beta.x * (low - key_in.x * read[tile][i % 2 * 2]),
                               beta.y * (high - key_in.y * read[tile][i % 2 * 2 + 1]));
      }
    }
    Accumulator solved[kTokenTiles];
    begin_products();
    start_times_transposed(solved, u, stage.inverse, true);
    commit_products();
    state.scale(expf(stage.factors[kLogDecay * kTokens + kTokens - 1]));
    if constexpr (kOutputs) {
      wait_for_products<1>();
      keep(o);
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) {
        const float2 query_in = factor_pair(stage.factors, kQueryIn, tile);
#pragma unroll
        for (int i = 0; i < 4; ++i) o[tile][i] *= i % 2 ? query_in.y : query_in.x;
      }
    }
    wait_for_products<0>();
    keep(solved);
    Fragment written[kTokens / 16];
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int tile = 2 * k + i / 2;
        const float low = solved[tile][i % 2 * 2], high = solved[tile][i % 2 * 2 + 1];
        const float2 key_out = factor_pair(stage.factors, kKeyOut, tile);
        u[k][i] = pack_pair<T>(low, high);
        written[k][i] = pack_pair<T>(low * key_out.x, high * key_out.y);
      }
    }
    begin_products();
    if constexpr (kOutputs) {
      start_times_transposed(o, u, stage.scores, false);
      commit_products();
    }
    state.template start_adding<T>(written, stage.keys);
    commit_products();
    if constexpr (kOutputs) {
      wait_for_products<1>();
      keep(o);
#pragma unroll
      for (int k = 0; k < kTokens / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          u[k][i] = pack_pair<T>(o[2 * k + i / 2][i % 2 * 2], o[2 * k + i / 2][i % 2 * 2 + 1]);
        }
      }
    }
    store_columns<T>(stage.values, tile_column, u);
    store_token_rows<T>(static_cast<T*>(p.o.data), stage.values, tile_column, in, chunk, head, column);
    wait_for_products<0>();
    keep(state.tiles);
    __syncthreads();
  }
  if (p.final_state.data) {
    state.store(p.final_state, p.final_state.offset(sequence_number, head), keys, values, column);
  }
}

}  // namespace inlay::gdn::cuda
