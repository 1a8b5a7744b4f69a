// What a chunk needs that does not depend on the state: see chunk.cuh.
#pragma once

#include "common/cuda/bulk.cuh"
#include "common/cuda/warpgroup.cuh"
#include "gdn/cuda/chunk.cuh"
#include "gdn/cuda/inverse.cuh"

namespace inlay::gdn::cuda {

inline constexpr int kPrepareThreads = 2 * kWarpgroup;
inline constexpr int kPrepareHeads = 2;  // at a time

template <typename T, int kKeys>
struct PrepareMemory {
  using Rows = Tile<T, kTokens, kKeys>;
  using Matrix = Tile<T, kTokens, kTokens>;
  // First keys and queries, then, in their place, images of each head's scores and inverse.
  static constexpr int kTilesBytes = 2 * (Rows::kBytes > 2 * Matrix::kBytes ? Rows::kBytes : 2 * Matrix::kBytes);
  static constexpr int kSystemsAt = kTilesBytes;
  static constexpr int kSystemBytes = kTokens * kInverseStride * 4;
  static constexpr int kFactorsAt = kSystemsAt + kPrepareHeads * kSystemBytes;
  static constexpr int kHeadFactors = (kFactors + 1) * kTokens;  // in floats; the last row is kShifted
  static constexpr int kBarrierAt = kFactorsAt + kPrepareHeads * kHeadFactors * 4;
  static constexpr int kBytes = kBarrierAt + sizeof(Barrier);
};

// Besides what others need (Factor): the log decay less that of the key's inverse length, so that of the two the
// exponential of a difference is the product.
inline constexpr int kShifted = kFactors;

// Sums of squares of a tile's rows, by two threads a row.
template <typename T, int kKeys>
__device__ inline float row_square_sum(const TileView<T, kTokens, kKeys>& tile, int row, int half) {
  float sum = 0.0f;
#pragma unroll
  for (int column = 0; column < kKeys / 2; column += 8) {
    const uint4 piece = load_shared(tile.address(row, half * (kKeys / 2) + column));
    const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (const uint32_t word : words) {
      float low, high;
      unpack_pair<T>(word, low, high);
      sum += low * low + high * high;
    }
  }
  return sum + __shfl_xor_sync(0xffffffffu, sum, 1);
}

// A head's gates, two tokens a lane.
struct Gates {
  float decay[2];  // cumulated, to base 2
  float end;       // of the chunk
  float beta[2];

  // A warp's work.
  __device__ void load(const Inputs& in, const Chunk& chunk, int64_t head) {
    const int lane = threadIdx.x % 32;
    float own[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = 2 * lane + j;
      float loaded[1] = {0.0f};
      own[j] = 0.0f;
      if (row < chunk.tokens) {
        const int64_t token = chunk.token + row;
        own[j] = static_cast<const float*>(in.g.data)[in.g.offset(chunk.batch, token, head)];
        if (own[j] < kSmallestGate) own[j] = kSmallestGate;  // NaN stays
        own[j] *= kLog2E;
        load_as_float(in.beta.data, in.beta.dtype, in.beta.offset(chunk.batch, token, head), loaded);
      }
      beta[j] = loaded[0];
    }
    float sum = own[0] + own[1];
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const float before = __shfl_up_sync(0xffffffffu, sum, offset);
      if (lane >= offset) sum += before;
    }
    end = __shfl_sync(0xffffffffu, sum, 31);
    // Not sum - own[1]: a large gate would cost the smaller one its digits.
    const float earlier = __shfl_up_sync(0xffffffffu, sum, 1);
    decay[0] = (lane == 0 ? 0.0f : earlier) + own[0];
    decay[1] = sum;
  }

  // All rows but the lengths, which are there.
  __device__ void store(float (*factors)[kTokens], float scale) const {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = 2 * (threadIdx.x % 32) + j;
      const float k = factors[kKeyLength][row], q = factors[kQueryLength][row], grown = exp2_fast(decay[j]);
      factors[kKeyIn][row] = k * grown;
      factors[kQueryIn][row] = scale * q * grown;
      factors[kKeyOut][row] = k * exp2_fast(end - decay[j]);
      factors[kBeta][row] = beta[j];
      factors[kLogDecay][row] = decay[j];
      factors[kShifted][row] = decay[j] - log2f(k);
    }
  }
};

// A block of 16 columns of what a warp has of a product of rows, [16, 64]: each entry (row, column) times its row's
// factor and exp2(row's decay - column's shifted one), or zero above the diagonal, where differences are positive and
// may overflow. kBlock: where the columns are against the rows.
enum class Block { before, diagonal };

template <Block kBlock, bool kWithDiagonal>
__device__ __forceinline__ void decay_block(float (&entries)[2][4], const Accumulator (&c)[kTokens / 8], int pair,
                                            const float (&row_factor)[2], const float (&row_decay)[2],
                                            const float* shifted) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    const float2 column_decay = *reinterpret_cast<const float2*>(&shifted[pair * 16 + tile * 8 + 2 * t]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float decay = exp2_fast(row_decay[i / 2] - (i % 2 ? column_decay.y : column_decay.x));
      const float entry = row_factor[i / 2] * decay * c[2 * pair + tile][i];
      const int row = i / 2 * 8 + g, column = tile * 8 + 2 * t + i % 2;
      const bool kept = kBlock == Block::before || row > column || (kWithDiagonal && row == column);
      entries[tile][i] = kept ? entry : 0.0f;
    }
  }
}

// A block has a chunk of one key head, and two of its value heads at a time. Its first warpgroup has the products of
// keys and keys, the second those of queries and keys, each for both heads; then each inverts one head's system.
template <typename T, int kKeys>
__global__ void __launch_bounds__(kPrepareThreads, kKeys > 128 ? 2 : 3)
    prepare_kernel(const __grid_constant__ ChunkParams p) {
  using Memory = PrepareMemory<T, kKeys>;
  const Inputs& in = p.inputs;
  const int thread = threadIdx.x, group_thread = thread % kWarpgroup, warp = group_thread / 32, lane = thread % 32;
  const int part = thread / kWarpgroup, g = lane / 4, t = lane % 4;
  const int64_t number = blockIdx.x / in.key_heads, key_head = blockIdx.x - number * in.key_heads;
  wait_for_predecessor();
  release_successor();
  const Chunk chunk = chunk_at(in.sequences, number);
  if (chunk.tokens == 0) return;

  char* const memory = dynamic_shared();
  const uint32_t base = shared_address(memory);
  const TileView<T, kTokens, kKeys> keys{base}, queries{base + Memory::kTilesBytes / 2};
  const auto scores_tile = [&](int i) { return TileView<T, kTokens, kTokens>{base + i * Memory::Matrix::kBytes}; };
  const auto inverse_tile = [&](int i) { return scores_tile(kPrepareHeads + i); };
  const auto system = [&](int i) {
    return reinterpret_cast<float*>(memory + Memory::kSystemsAt + i * Memory::kSystemBytes);
  };
  const auto factors_of = [&](int i) {
    return reinterpret_cast<float (*)[kTokens]>(memory + Memory::kFactorsAt) + i * (kFactors + 1);
  };
  Barrier& fetched = *reinterpret_cast<Barrier*>(memory + Memory::kBarrierAt);
  if (thread == 0) {
    init_barrier(fetched, kFetchArrivals<kPrepareThreads>);
    publish_barriers();
  }
  __syncthreads();

  const int key_dim = static_cast<int>(in.key_dim);
  expect_bytes(fetched, in_boxes(p, chunk) ? 2 * Memory::Rows::kBytes : 0, thread);
  fetch_rows<kPrepareThreads>(keys, p, in.k, p.k, chunk, key_head, 0, key_dim, fetched, thread);
  fetch_rows<kPrepareThreads>(queries, p, in.q, p.q, chunk, key_head, 0, key_dim, fetched, thread);
  arrive_fetched(fetched, !in_boxes(p, chunk));
  const int group = static_cast<int>(in.group());
  Gates gates;
  if (warp == 0 && part < group) gates.load(in, chunk, key_head * group + part);
  wait_at(fetched, 0);

  {  // each half the rows' lengths, for both heads
    const int row = group_thread / 2;
    const float sum = row_square_sum<T, kKeys>(part == 0 ? keys : queries, row, group_thread % 2);
    const float length = in.l2norm_qk ? 1.0f / sqrtf(sum + static_cast<float>(kL2Eps)) : 1.0f;
    factors_of(group_thread % 2)[part == 0 ? kKeyLength : kQueryLength][row] = length;
  }
  __syncthreads();
  Accumulator c[kTokens / 8];  // k k^T or q k^T
  begin_products();
#pragma unroll
  for (int k = 0; k < kKeys / 16; ++k) {
    multiply_by_rows<kTokens / 8>(c, RowsOf<T, kTokens, kKeys>{part == 0 ? keys : queries}, k, keys, 0, k * 16, k == 0);
  }
  commit_products();
  const float scale = static_cast<float>(in.scale);
  if (warp == 0 && part < group) gates.store(factors_of(part), scale);
  wait_for_products<0>();
  keep(c);
  __syncthreads();

  for (int first = 0; first < group; first += kPrepareHeads) {
    const int heads = min(kPrepareHeads, group - first);
#pragma unroll 1
    for (int i = 0; i < heads; ++i) {
      const float (*const factors)[kTokens] = factors_of(i);
      float row_factor[2], row_decay[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp * 16 + half * 8 + g;
        row_decay[half] = factors[kLogDecay][row];
        row_factor[half] =
            part == 0 ? factors[kBeta][row] * factors[kKeyLength][row] : scale * factors[kQueryLength][row];
      }
#pragma unroll
      for (int pair = 0; pair < kTokens / 16; ++pair) {
        float entries[2][4] = {};
        if (part == 0) {
          if (pair > warp) continue;
          if (pair == warp) {
            decay_block<Block::diagonal, false>(entries, c, pair, row_factor, row_decay, factors[kShifted]);
          } else {
            decay_block<Block::before, false>(entries, c, pair, row_factor, row_decay, factors[kShifted]);
          }
          float* const target = system(i) + (warp * 16 + g) * kInverseStride + pair * 16 + 2 * t;
#pragma unroll
          for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float2 both = make_float2(entries[tile][2 * half], entries[tile][2 * half + 1]);
              if (pair < warp) both = make_float2(round_to_tf32(both.x), round_to_tf32(both.y));
              *reinterpret_cast<float2*>(target + half * 8 * kInverseStride + tile * 8) = both;
            }
          }
        } else {
          if (pair == warp) {
            decay_block<Block::diagonal, true>(entries, c, pair, row_factor, row_decay, factors[kShifted]);
          } else if (pair < warp) {
            decay_block<Block::before, true>(entries, c, pair, row_factor, row_decay, factors[kShifted]);
          }
          const Fragment words = {
              pack_pair<T>(entries[0][0], entries[0][1]), pack_pair<T>(entries[0][2], entries[0][3]),
              pack_pair<T>(entries[1][0], entries[1][1]), pack_pair<T>(entries[1][2], entries[1][3])};
          scores_tile(i).store_rows_first(words, warp * 16, pair * 16);
        }
      }
    }
    publish_shared();
    __syncthreads();
    const int64_t unit = number * in.value_heads + key_head * group + first;
    for (int i = 0; i < heads; ++i) {
      store_bytes_bulk<kPrepareThreads>(static_cast<T*>(p.prepared.scores) + (unit + i) * kMatrix, scores_tile(i).base,
                                        Memory::Matrix::kBytes, thread);
      store_bytes_bulk<kPrepareThreads>(p.prepared.factors + (unit + i) * (kFactors * kTokens),
                                        shared_address(factors_of(i)), kFactors * kTokens * 4, thread);
    }
    invert(system(part));  // of a head that there is not: nobody looks at it
    __syncthreads();

    if (part < heads) {
      const int row = group_thread / 2;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = (group_thread % 2 + 2 * j) * 8;
        float values[8] = {};
        if (column / 16 <= row / 16) unpack(load<float, 8>(&system(part)[row * kInverseStride + column]), values);
        const Packed<T, 8> piece = pack<T>(values);
        store_shared(inverse_tile(part).address(row, column), *reinterpret_cast<const uint4*>(&piece));
      }
    }
    publish_shared();
    __syncthreads();
    for (int i = 0; i < heads; ++i) {
      store_bytes_bulk<kPrepareThreads>(static_cast<T*>(p.prepared.inverse) + (unit + i) * kMatrix,
                                        inverse_tile(i).base, Memory::Matrix::kBytes, thread);
    }
    wait_for_stores();
    const int next = first + kPrepareHeads + part;
    if (first + kPrepareHeads < group) {
      if (warp == 0 && next < group) gates.load(in, chunk, key_head * group + next);
      __syncthreads();  // before factors, systems and images are overwritten
      if (warp == 0 && next < group) gates.store(factors_of(part), scale);
      __syncthreads();
    }
  }
}

}  // namespace inlay::gdn::cuda
