// What the two walks over a head's chunks have in common: scan_forward.cuh and scan_backward.cuh.
//
// Everything is transposed, so that four warps have 64 of the state's columns, as rows, from the first chunk to the
// last in registers, and what one product gives is an operand of the next. Columns do not see each other: where there
// are few heads, more blocks share one, and each reads all of its k and q.
//
// A block's warpgroups have different work. The first fetches chunks, some ahead. Then come `kGroups` that carry the
// state of 64 columns each, and last as many that take from these, through shared memory, what others need not wait
// for.
//
// What was learnt on an H200, in cycles of a chunk, by reading the clock between the steps: one warpgroup's chain takes
// about 2300 forward and 2700 backward; a product of 64x64x16 with an operand in registers takes 40. Lanes that start
// copies do so one after another: the stores of 64 rows by 64 lanes held a chunk up for 2600.
#pragma once

#include "common/cuda/bulk.cuh"
#include "gdn/cuda/chunk.cuh"
#include "gdn/cuda/chunk.h"
#include "gdn/cuda/state.cuh"

namespace inlay::gdn::cuda {

inline constexpr int kGroupColumns = 64;

enum class Role { fetch, carry, pass_on };

// How a block's threads and registers are dealt out.
template <int kGroups>
struct ScanTeam {
  static constexpr int kThreads = kWarpgroup * (1 + 2 * kGroups);
  // Their sum must not be over what the block is started with, or it would wait for registers for ever.
  static constexpr int kFetchRegisters = kGroups == 1 ? 96 : 32;
  static constexpr int kCarryRegisters = kGroups == 1 ? 232 : 160;
  static constexpr int kPassOnRegisters = kGroups == 1 ? 168 : 64;
  static constexpr int kStartRegisters = 65536 / kThreads / 8 * 8;
  static_assert(kFetchRegisters + kGroups * (kCarryRegisters + kPassOnRegisters) <=
                (1 + 2 * kGroups) * kStartRegisters);
};

// Of the stages, and of what each group hands over: the state, and its tokens' values.
template <int kGroups, int kStages>
struct ScanBarriers {
  Barrier full[kStages], empty[kStages];
  Barrier state_ready[kGroups], state_taken[kGroups], values_ready[kGroups], values_taken[kGroups];
  Barrier rows[kGroups];  // within a group that passes on
};

// Where a block's tiles lie. kBothKinds: with queries and scores; kTokenRows: groups write rows of tokens.
template <typename T, int kKeys, int kGroups, bool kBothKinds_, bool kTokenRows>
struct ScanMemory {
  static constexpr int kColumns = kGroups * kGroupColumns;
  static constexpr int kFactorBytes = (kLogDecay + 1) * kTokens * 4;
  using Rows = Tile<T, kTokens, kKeys>;
  using Matrix = Tile<T, kTokens, kTokens>;
  using Values = Tile<T, kTokens, kColumns>;
  static constexpr bool kBothKinds = kBothKinds_;
  // Of a stage.
  static constexpr int kMatrixAt = (kBothKinds ? 2 : 1) * Rows::kBytes;
  static constexpr int kValuesAt = kMatrixAt + (kBothKinds ? 2 : 1) * Matrix::kBytes;
  static constexpr int kStageBytes = kValuesAt + Values::kBytes;
  // Of a group.
  static constexpr int kPassedValuesAt = Rows::kBytes;
  static constexpr int kPassedRowsAt = kPassedValuesAt + Matrix::kBytes;
  static constexpr int kGroupBytes = kPassedRowsAt + (kTokenRows ? Matrix::kBytes : 0);
  static constexpr int bytes_with(int stages) {
    return stages * (kStageBytes + kFactorBytes) + kGroups * kGroupBytes + int{sizeof(ScanBarriers<kGroups, 3>)};
  }
  static constexpr int kMost = kChunkSharedBytes;
  static constexpr int kStages = bytes_with(3) <= kMost ? 3 : bytes_with(2) <= kMost ? 2 : 1;
  using Barriers = ScanBarriers<kGroups, kStages>;
  static constexpr int kGroupsAt = kStages * kStageBytes;
  static constexpr int kFactorsAt = kGroupsAt + kGroups * kGroupBytes;
  static constexpr int kBarriersAt = kFactorsAt + kStages * kFactorBytes;
  static constexpr int kBytes = kBarriersAt + sizeof(Barriers);
  // What comes for a stage as rows of tokens, and in bulk.
  static constexpr int kRowBytes = kMatrixAt + Values::kBytes;
  static constexpr int kImageBytes = kStageBytes - kRowBytes + kFactorBytes;
  static_assert(kBytes <= kMost);
};

// One stage's tiles. `queries` and `scores` are for kernels with two of a kind.
template <class Memory, typename T, int kKeys>
struct ScanStage {
  TileView<T, kTokens, kKeys> keys, queries;
  TileView<T, kTokens, kTokens> inverse, scores;
  TileView<T, kTokens, Memory::kColumns> values;
  float* factors;

  __device__ ScanStage(char* memory, int stage) {
    keys.base = shared_address(memory) + stage * Memory::kStageBytes;
    queries.base = keys.base + Memory::Rows::kBytes;
    inverse.base = keys.base + Memory::kMatrixAt;
    scores.base = inverse.base + Memory::Matrix::kBytes;
    values.base = keys.base + Memory::kValuesAt;
    factors = reinterpret_cast<float*>(memory + Memory::kFactorsAt + stage * Memory::kFactorBytes);
  }
};

// The barriers, ready for use. By all threads, before anything else. `readers`: warpgroups of each group that read
// stages.
template <class Memory, int kGroups>
__device__ __forceinline__ typename Memory::Barriers& init_barriers(char* memory, int readers) {
  constexpr int kWarps = kWarpgroup / 32;
  auto& barriers = *reinterpret_cast<typename Memory::Barriers*>(memory + Memory::kBarriersAt);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Memory::kStages; ++stage) {
      init_barrier(barriers.full[stage], kFetchArrivals<kWarpgroup>);
      init_barrier(barriers.empty[stage], kWarps * readers * kGroups);
    }
    for (int group = 0; group < kGroups; ++group) {
      init_barrier(barriers.state_ready[group], kWarps);
      init_barrier(barriers.state_taken[group], kWarps);
      init_barrier(barriers.values_ready[group], kWarps);
      init_barrier(barriers.values_taken[group], kWarps);
      init_barrier(barriers.rows[group], kWarps);
    }
    publish_barriers();
  }
  __syncthreads();
  return barriers;
}

// What a group hands over, the state [64 of V, K] and a tile [64 of V, kTokens], and what it writes, [kTokens, 64 of
// V].
template <class Memory, typename T, int kKeys>
struct ScanPassed {
  TileView<T, kTokens, kKeys> state;
  TileView<T, kTokens, kTokens> values;
  TileView<T, kTokens, kGroupColumns> rows;

  __device__ ScanPassed(char* memory, int group) {
    state.base = shared_address(memory) + Memory::kGroupsAt + group * Memory::kGroupBytes;
    values.base = state.base + Memory::kPassedValuesAt;
    rows.base = state.base + Memory::kPassedRowsAt;
  }
};

// One thread's place: which sequence, head and columns.
template <int kGroups>
struct ScanPlace {
  Role role;
  int group;   // of the role
  int thread;  // of the warpgroup
  int warp;
  int64_t head;
  int64_t key_head;
  int64_t sequence_number;
  Sequence sequence;
  int64_t first_number;  // of chunks
  int64_t chunks;
  int block_column;
  int group_column;  // within the block

  __device__ explicit ScanPlace(const Inputs& in) {
    const int warpgroup = threadIdx.x / kWarpgroup;
    role = warpgroup == 0 ? Role::fetch : warpgroup <= kGroups ? Role::carry : Role::pass_on;
    group = role == Role::fetch ? 0 : (warpgroup - 1) % kGroups;
    thread = threadIdx.x % kWarpgroup;
    warp = thread / 32;
    const int parts = (static_cast<int>(in.value_dim) + kGroups * kGroupColumns - 1) / (kGroups * kGroupColumns);
    const int64_t head_number = blockIdx.x / parts;
    block_column = static_cast<int>(blockIdx.x - head_number * parts) * kGroups * kGroupColumns;
    group_column = group * kGroupColumns;
    sequence_number = head_number / in.value_heads;
    head = head_number - sequence_number * in.value_heads;
    key_head = head / in.group();
    sequence = in.sequences[sequence_number];
    first_number = in.sequences.first_chunk(sequence_number, kChunk);
    chunks = (sequence.end - sequence.begin + kChunk - 1) / kChunk;
  }

  // The warp's 16 columns, of the block's tiles and of V.
  __device__ int tile_column() const { return group_column + warp * 16; }
  __device__ int column() const { return block_column + tile_column(); }

  __device__ Chunk chunk(int64_t index) const {
    const int64_t token = sequence.begin + index * kChunk;
    return {sequence.batch, token, static_cast<int>(min(sequence.end - token, kChunk))};
  }
  // Of the chunk and value head, in memory for [chunk number][value head].
  __device__ int64_t unit(const Inputs& in, int64_t index) const {
    return (first_number + index) * in.value_heads + head;
  }
};

// The fetching warpgroup's work: all chunks, one after another, from the first on or backwards.
template <class Memory, typename T, int kKeys, int kGroups>
__device__ __forceinline__ void fetch_chunks(char* memory, typename Memory::Barriers& barriers,
                                             const ScanPlace<kGroups>& place, const ChunkParams& p,
                                             const TokenTensor& values, const TokenRows& value_rows, bool backwards) {
  const Inputs& in = p.inputs;
  const int key_dim = static_cast<int>(in.key_dim), value_dim = static_cast<int>(in.value_dim);
  const unsigned thread = place.thread;
  Turn<Memory::kStages> turn;
  for (int64_t step = 0; step < place.chunks; ++step, turn.next()) {
    const int64_t index = backwards ? place.chunks - 1 - step : step, unit = place.unit(in, index);
    const ScanStage<Memory, T, kKeys> stage(memory, turn.stage);
    const Chunk chunk = place.chunk(index);
    const bool boxed = in_boxes(p, chunk);
    Barrier& full = barriers.full[turn.stage];
    if (turn.phase > 0) wait_at(barriers.empty[turn.stage], turn.phase - 1);
    const auto fetch_image = [&](uint32_t shared, const void* images, int bytes) {
      fetch_bytes<kWarpgroup>(shared, static_cast<const char*>(images) + unit * bytes, bytes, full, thread);
    };
    expect_bytes(full, Memory::kImageBytes + (boxed ? Memory::kRowBytes : 0), thread);
    fetch_rows<kWarpgroup>(stage.keys, p, in.k, p.k, chunk, place.key_head, 0, key_dim, full, thread);
    fetch_rows<kWarpgroup>(stage.values, p, values, value_rows, chunk, place.head, place.block_column, value_dim, full,
                           thread);
    fetch_image(stage.inverse.base, p.prepared.inverse, Memory::Matrix::kBytes);
    fetch_bytes<kWarpgroup>(shared_address(stage.factors), p.prepared.factors + unit * (kFactors * kTokens),
                            Memory::kFactorBytes, full, thread);
    if constexpr (Memory::kBothKinds) {
      fetch_rows<kWarpgroup>(stage.queries, p, in.q, p.q, chunk, place.key_head, 0, key_dim, full, thread);
      fetch_image(stage.scores.base, p.prepared.scores, Memory::Matrix::kBytes);
    }
    arrive_fetched(full, !boxed);
  }
}

// A factor of the two tokens that a lane has of a tile of eight.
__device__ inline float2 factor_pair(const float* factors, Factor factor, int tile) {
  return *reinterpret_cast<const float2*>(&factors[factor * kTokens + tile * 8 + threadIdx.x % 4 * 2]);
}

// The same of all of a chunk's tokens. kEarly: loaded at once, while a product is under way; else when they are used.
template <bool kEarly>
struct FactorPairs {
  const float* factors;
  Factor factor;

  __device__ __forceinline__ FactorPairs(const float* factors, Factor factor) : factors(factors), factor(factor) {}
  __device__ __forceinline__ float2 operator()(int tile) const { return factor_pair(factors, factor, tile); }
};

template <>
struct FactorPairs<true> {
  float2 tiles[kTokens / 8];

  __device__ __forceinline__ FactorPairs(const float* factors, Factor factor) {
#pragma unroll
    for (int tile = 0; tile < kTokens / 8; ++tile) tiles[tile] = factor_pair(factors, factor, tile);
  }
  __device__ __forceinline__ float2 operator()(int tile) const { return tiles[tile]; }
};

__device__ inline float chunk_decay(const float* factors) {
  return exp2_fast(factors[kLogDecay * kTokens + kTokens - 1]);
}

// x = c with each token's column times its factor, rounded.
template <typename T, class FactorOf>
__device__ __forceinline__ void round_scaled(Fragment (&x)[kTokens / 16], const Accumulator (&c)[kTokens / 8],
                                             FactorOf factor_of) {
#pragma unroll
  for (int k = 0; k < kTokens / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int tile = 2 * k + i / 2;
      const float2 factor = factor_of(tile);
      x[k][i] = pack_pair<T>(c[tile][i % 2 * 2] * factor.x, c[tile][i % 2 * 2 + 1] * factor.y);
    }
  }
}

template <typename T>
__device__ __forceinline__ void round_plain(Fragment (&x)[kTokens / 16], const Accumulator (&c)[kTokens / 8]) {
  round_scaled<T>(x, c, [](int) { return make_float2(1.0f, 1.0f); });
}

__device__ __forceinline__ void scale_tokens(Accumulator (&c)[kTokens / 8], const float* factors, Factor factor) {
#pragma unroll
  for (int tile = 0; tile < kTokens / 8; ++tile) {
    const float2 pair = factor_pair(factors, factor, tile);
#pragma unroll
    for (int i = 0; i < 4; ++i) c[tile][i] *= i % 2 ? pair.y : pair.x;
  }
}

// A warp's x^T [16, kTokens] as rows of a tile [64 of V, kTokens].
template <typename T>
__device__ inline void store_rows(const TileView<T, kTokens, kTokens>& tile, int warp,
                                  const Fragment (&x)[kTokens / 16]) {
#pragma unroll
  for (int k = 0; k < kTokens / 16; ++k) tile.store_rows_first(x[k], warp * 16, k * 16);
}

// A warp's x^T [16, kTokens] as columns of a tile [kTokens, of V].
template <typename T>
__device__ inline void store_columns(const TileView<T, kTokens, kGroupColumns>& tile, int column,
                                     const Fragment (&x)[kTokens / 16]) {
#pragma unroll
  for (int k = 0; k < kTokens / 16; ++k) tile.store_columns_first(x[k], k * 16, column);
}

// A group's rows to their place, `column`, in a dense [B, T, Hv, V].
template <typename T>
__device__ __forceinline__ void store_tokens(void* output, const TokenRows& boxes, const ChunkParams& p,
                                             const TileView<T, kTokens, kGroupColumns>& rows, const Chunk& chunk,
                                             int64_t head, int column, unsigned thread) {
  const Inputs& in = p.inputs;
  if (column >= in.value_dim) return;
  if (in_boxes(p, chunk)) {
    if (thread == 0) {
      store_box(boxes.map, column, static_cast<int>(chunk.token), static_cast<int>(head), static_cast<int>(chunk.batch),
                rows.base);
    }
    return;
  }
  constexpr unsigned kPieces = kGroupColumns / 8, kRowStep = kWarpgroup / kPieces;
  const unsigned part = thread % kPieces * 8;
  if (column + static_cast<int>(part) >= in.value_dim) return;
  const int64_t pitch = in.value_heads * in.value_dim;
  T* target = static_cast<T*>(output) + (chunk.batch * in.sequences.tokens + chunk.token + thread / kPieces) * pitch +
              head * in.value_dim + column + part;
#pragma unroll 1
  for (unsigned row = thread / kPieces; row < static_cast<unsigned>(chunk.tokens);
       row += kRowStep, target += kRowStep * pitch) {
    *reinterpret_cast<uint4*>(target) = load_shared(rows.address(row, part));
  }
}

// A group's tile as an image of its slice of V.
template <class Image>
__device__ inline void store_image(void* images, int64_t unit, uint32_t tile, const Inputs& in, int column,
                                   unsigned thread) {
  if (column >= in.value_dim) return;
  const int64_t slice = unit * value_slices(in) + column / kSlice;
  store_bytes_bulk<kWarpgroup>(static_cast<char*>(images) + slice * Image::kBytes, tile, Image::kBytes, thread);
}

}  // namespace inlay::gdn::cuda
