// What a chunk needs that does not depend on the state: see chunk.cuh.
#pragma once

#include "common/cuda/bulk.cuh"
#include "gdn/cuda/chunk.cuh"
#include "gdn/cuda/inverse.cuh"

namespace inlay::gdn::cuda {

inline constexpr int kPrepareThreads = 128;  // each warp has 16 rows of the matrices

template <typename T, int kKeys>
struct PrepareMemory {
  using Rows = Tile<T, kTokens, kKeys>;
  static constexpr int kQueryOffset = Rows::kBytes;
  static constexpr int kMatrixOffset = kQueryOffset + Rows::kBytes;
  static constexpr int kFactorsOffset = kMatrixOffset + kTokens * kInverseStride * 4;
  static constexpr int kBytes = kFactorsOffset + kFactors * kTokens * 4;
};

// Sums of squares of a tile's rows, by two threads a row.
template <typename T, int kKeys>
__device__ inline float row_square_sum(uint32_t tile, int row, int half) {
  float sum = 0.0f;
#pragma unroll
  for (int column = 0; column < kKeys / 2; column += 8) {
    const uint4 piece = load_shared(tile + Tile<T, kTokens, kKeys>::offset(row, half * (kKeys / 2) + column));
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

// Of an image [kTokens, kTokens].
template <typename T>
__device__ inline void store_piece(T* image, int row, int column, uint4 piece) {
  *reinterpret_cast<uint4*>(reinterpret_cast<char*>(image) + Tile<T, kTokens, kTokens>::offset(row, column)) = piece;
}

// A block has a chunk of one key head, and its value heads one after another.
template <typename T, int kKeys>
__global__ void __launch_bounds__(kPrepareThreads, 4) prepare_kernel(const __grid_constant__ ChunkParams p) {
  using Memory = PrepareMemory<T, kKeys>;
  const Inputs& in = p.inputs;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int64_t number = blockIdx.x / in.key_heads, key_head = blockIdx.x - number * in.key_heads;
  wait_for_predecessor();
  release_successor();
  const Chunk chunk = chunk_at(in.sequences, number);
  if (chunk.tokens == 0) return;

  char* const memory = dynamic_shared();
  const TileView<T, kTokens, kKeys> keys{shared_address(memory)},
      queries{shared_address(memory + Memory::kQueryOffset)};
  float* const matrix = reinterpret_cast<float*>(memory + Memory::kMatrixOffset);
  float (*const factors)[kTokens] = reinterpret_cast<float (*)[kTokens]>(memory + Memory::kFactorsOffset);
  const int key_dim = static_cast<int>(in.key_dim);
  fetch_tile<kPrepareThreads>(keys, rows_of<T>(in.k, chunk, key_head, key_dim, p.aligned), thread);
  fetch_tile<kPrepareThreads>(queries, rows_of<T>(in.q, chunk, key_head, key_dim, p.aligned), thread);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();

  {
    const int row = thread / 2, half = thread % 2;
    const float eps = static_cast<float>(kL2Eps);
    const float k = row_square_sum<T, kKeys>(keys.base, row, half);
    const float q = row_square_sum<T, kKeys>(queries.base, row, half);
    if (half == 0) {
      factors[kKeyLength][row] = in.l2norm_qk ? 1.0f / sqrtf(k + eps) : 1.0f;
      factors[kQueryLength][row] = in.l2norm_qk ? 1.0f / sqrtf(q + eps) : 1.0f;
    }
  }
  __syncthreads();
  {
    const int64_t unit = number * in.key_heads + key_head;
    store_bytes<kPrepareThreads>(static_cast<char*>(p.prepared.keys) + unit * Memory::Rows::kBytes, keys.base,
                                 Memory::Rows::kBytes, thread);
    store_bytes<kPrepareThreads>(static_cast<char*>(p.prepared.queries) + unit * Memory::Rows::kBytes, queries.base,
                                 Memory::Rows::kBytes, thread);
  }
  Accumulator kk[kTokens / 8] = {}, qk[kTokens / 8] = {};  // k k^T and q k^T, not above the diagonal
#pragma unroll
  for (int column = 0; column < kKeys; column += 16) {
    Fragment k_rows, q_rows;
    keys.template load_rows_first<false>(k_rows, warp * 16, column);
    queries.template load_rows_first<false>(q_rows, warp * 16, column);
#pragma unroll
    for (int pair = 0; pair < kTokens / 16; ++pair) {
      if (pair > warp) continue;
      Fragment k;
      keys.template load_columns_first<false>(k, pair * 16, column);
      multiply_add<T>(kk[2 * pair], k_rows, k[0], k[1]);
      multiply_add<T>(kk[2 * pair + 1], k_rows, k[2], k[3]);
      multiply_add<T>(qk[2 * pair], q_rows, k[0], k[1]);
      multiply_add<T>(qk[2 * pair + 1], q_rows, k[2], k[3]);
    }
  }

  const int group = static_cast<int>(in.group());
  for (int i = 0; i < group; ++i) {
    const int64_t head = key_head * group + i;
    const int64_t unit = number * in.value_heads + head;
    if (warp == 0) {  // two tokens a lane
      float decay[2], beta[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = 2 * lane + j;
        float loaded[1] = {0.0f};
        decay[j] = 0.0f;
        if (row < chunk.tokens) {
          const int64_t token = chunk.token + row;
          decay[j] = static_cast<const float*>(in.g.data)[in.g.offset(chunk.batch, token, head)];
          if (decay[j] < kSmallestGate) decay[j] = kSmallestGate;  // NaN stays
          decay[j] *= kLog2E;
          load_as_float(in.beta.data, in.beta.dtype, in.beta.offset(chunk.batch, token, head), loaded);
        }
        beta[j] = loaded[0];
      }
      float sum = decay[0] + decay[1];
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const float before = __shfl_up_sync(0xffffffffu, sum, offset);
        if (lane >= offset) sum += before;
      }
      const float end = __shfl_sync(0xffffffffu, sum, 31);
      // Not sum - decay[1]: a large gate would cost the smaller one its digits.
      const float earlier = __shfl_up_sync(0xffffffffu, sum, 1);
      const float first = (lane == 0 ? 0.0f : earlier) + decay[0];
      const float cumulated[2] = {first, sum};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = 2 * lane + j;
        const float k = factors[kKeyLength][row], q = factors[kQueryLength][row], grown = exp2_fast(cumulated[j]);
        factors[kKeyIn][row] = k * grown;
        factors[kQueryIn][row] = static_cast<float>(in.scale) * q * grown;
        factors[kKeyOut][row] = k * exp2_fast(end - cumulated[j]);
        factors[kBeta][row] = beta[j];
        factors[kLogDecay][row] = cumulated[j];
      }
    }
    __syncthreads();

    for (int j = thread; j < kFactors * kTokens / 4; j += kPrepareThreads) {
      reinterpret_cast<uint4*>(p.prepared.factors + unit * (kFactors * kTokens))[j] =
          reinterpret_cast<const uint4*>(factors)[j];
    }
    T* const scores = static_cast<T*>(p.prepared.scores) + unit * kMatrix;
    const float scale = static_cast<float>(in.scale);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + half * 8 + g;
      const float cumulated = factors[kLogDecay][row], beta = factors[kBeta][row];
      const float k_row = factors[kKeyLength][row], q_row = factors[kQueryLength][row];
#pragma unroll
      for (int quad = 0; quad < 2; ++quad) {  // four tiles of eight columns
        Fragment words = {};
#pragma unroll
        for (int tile = 0; tile < 4; ++tile) {
          if (quad * 2 > warp) continue;  // above the diagonal: zeros
          const int n = quad * 4 + tile;
          float score[2], entry[2];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int column = n * 8 + 2 * t + j;
            // Masked before the exponential: later tokens' differences are positive and may overflow.
            const float decay = row >= column ? exp2_fast(cumulated - factors[kLogDecay][column]) : 0.0f;
            const float both = factors[kKeyLength][column] * decay;
            score[j] = row >= column ? scale * q_row * both * qk[n][2 * half + j] : 0.0f;
            entry[j] = row > column ? beta * k_row * both * kk[n][2 * half + j] : 0.0f;
          }
          words[tile] = pack_pair<T>(score[0], score[1]);
          *reinterpret_cast<float2*>(&matrix[row * kInverseStride + n * 8 + 2 * t]) = make_float2(entry[0], entry[1]);
        }
        transpose_quad(words);
        const uint4 piece = {words[0], words[1], words[2], words[3]};
        store_piece(scores, row, (quad * 4 + t) * 8, piece);
      }
    }
    __syncthreads();
    invert(matrix);
    __syncthreads();

    T* const inverse = static_cast<T*>(p.prepared.inverse) + unit * kMatrix;
    const int row = thread / 2;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = (thread % 2 + 2 * j) * 8;
      float values[8] = {};
      if (column / 16 <= row / 16) unpack(load<float, 8>(&matrix[row * kInverseStride + column]), values);
      const Packed<T, 8> piece = pack<T>(values);
      store_piece(inverse, row, column, *reinterpret_cast<const uint4*>(&piece));
    }
    __syncthreads();
  }
}

}  // namespace inlay::gdn::cuda
