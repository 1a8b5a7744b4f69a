// The gradients of q, k, g and beta, of all chunks at once, when the states before and the gradients of the states
// after each chunk are known (scan.cuh, scan_backward.cuh). With their names, for one value head, S and G as they were
// there:
//
//   dscores = do u^T            dM = -w u^T                        both not above the diagonal, dM not on it either
//   Y = dscores scale r_i r_j D                    N = dM beta_i r_i r_j D
//   x = r dq = q_in * do S^T + Y k                 of q's normalised rows
//   y = r dk = k_out * u G^T - beta k_in * w S^T + Y^T q + (N + N^T) k
//   dq = x - r^2 q <q, x>, dk likewise             through the normalisation; without it x and y themselves
//   dbeta_i = <w_i, v_i> - k_in_i <k_i, (w S^T)_i> + sum_j dM_ij M_ij / beta_i
//   E = dscores * scores + dM * M
//   dc_i = sum_j (E_ij - E_ji) + q_in_i <q_i, (do S^T)_i> - beta_i k_in_i <k_i, (w S^T)_i> - e_i
//     with e_i = k_out_i <k_i, (u G^T)_i>, whose sum, with exp(c_end) <S, G>, comes to the last token's
//   dg_i = dc_i + dc_{i+1} + ...
//
// (M's inverse needs no products of its own: inverse^T dinverse inverse^T = w u^T.)
#pragma once

#include "common/cuda/bulk.cuh"
#include "common/cuda/warpgroup.cuh"
#include "gdn/cuda/chunk.cuh"

namespace inlay::gdn::cuda {

inline constexpr int kGradientWarps = 8;  // four groups of 16 tokens by two halves of the columns
inline constexpr int kGradientThreads = 32 * kGradientWarps;

struct GradientParams {
  ChunkParams chunk;
  TokenTensor dout;
  const void* u;  // BackwardScratch's
  const void* w;
  const void* states;
  const void* dstates;
  OutputTensor dq;  // [B, T, Hk, K] T
  OutputTensor dk;
  OutputTensor dg;     // [B, T, Hv] float32
  OutputTensor dbeta;  // [B, T, Hv]
};

template <typename T, int kKeys>
struct GradientMemory {
  static constexpr int kStages = kKeys > 128 ? 1 : 2;
  using Rows = Tile<T, kTokens, kKeys>;
  using States = Tile<T, kSlice, kKeys>;
  using Slice = Tile<T, kTokens, kSlice>;
  // Of a stage.
  static constexpr int kDStates = States::kBytes;
  static constexpr int kDout = 2 * States::kBytes;
  static constexpr int kW = kDout + Slice::kBytes;
  static constexpr int kU = kW + Slice::kBytes;
  static constexpr int kV = kU + Slice::kBytes;
  static constexpr int kStageBytes = kV + Slice::kBytes;
  // Of the block.
  static constexpr int kQueries = Rows::kBytes;
  static constexpr int kStagesAt = 2 * Rows::kBytes;
  static constexpr int kY = kStagesAt + kStages * kStageBytes;
  static constexpr int kN = kY + Tile<T, kTokens, kTokens>::kBytes;
  static constexpr int kFactorsAt = kN + Tile<T, kTokens, kTokens>::kBytes;
  static constexpr int kSums = kFactorsAt + kFactors * kTokens * 4;
  static constexpr int kSumRows = 16;
  static constexpr int kBarriersAt = kSums + kSumRows * kTokens * 4;
  static constexpr int kBytes = kBarriersAt + 8 * (1 + kStages);
  // What comes in bulk for a stage.
  static constexpr int kBulkBytes = 2 * (States::kBytes + Slice::kBytes);
};

// What the warps of a block add up of each token: rows of float32 [kTokens], one for each warp that has a part of it.
enum Sum : int {
  kQueryDot = 0,
  kKeyDot = 2,
  kStateDot = 4,
  kRowSum = 6,
  kBetaSum = 8,
  kColumnSum = 10,
  kValueDot = 14
};

// Starts c[64, kKeys / 2] += a's step times that half of a tile's columns.
template <typename T, int kKeys, class A>
__device__ __forceinline__ void start_times_half(Accumulator (&c)[kKeys / 16], const A& a, int step,
                                                 const TileView<T, 64, kKeys>& tile, int half) {
  constexpr int kTiles = kKeys / 16 < 8 ? kKeys / 16 : 8;
#pragma unroll
  for (int first = 0; first < kKeys / 16; first += kTiles) {
    multiply_by_columns<kTiles>(c + first, a, step, tile, step * 16, half * (kKeys / 2) + first * 8);
  }
}

template <typename T, int kKeys>
__global__ void __launch_bounds__(kGradientThreads, 1) gradients_kernel(const __grid_constant__ GradientParams p) {
  using Memory = GradientMemory<T, kKeys>;
  constexpr int kTiles = kKeys / 16;  // of eight columns, that a warp has of K
  const Inputs& in = p.chunk.inputs;
  const int keys = static_cast<int>(in.key_dim), values = static_cast<int>(in.value_dim);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int token_group = warp % 4, half = warp / 4, first_row = token_group * 16, first_column = half * (kKeys / 2);
  const int64_t number = blockIdx.x / in.key_heads, key_head = blockIdx.x - number * in.key_heads;
  wait_for_predecessor();
  release_successor();
  const Chunk chunk = chunk_at(in.sequences, number);
  if (chunk.tokens == 0) return;

  char* const memory = dynamic_shared();
  const uint32_t base = shared_address(memory);
  const TileView<T, kTokens, kKeys> k_tile{base}, q_tile{base + Memory::kQueries};
  const TileView<T, kTokens, kTokens> y_tile{base + Memory::kY}, n_tile{base + Memory::kN};
  float (*const factors)[kTokens] = reinterpret_cast<float (*)[kTokens]>(memory + Memory::kFactorsAt);
  float (*const sums)[kTokens] = reinterpret_cast<float (*)[kTokens]>(memory + Memory::kSums);
  __shared__ float state_dots[kGradientWarps];
  const int64_t token_row = chunk.batch * in.sequences.tokens + chunk.token;  // of dense [B * T, ...]
  const int group = static_cast<int>(in.group()), slices = (values + kSlice - 1) / kSlice;

  Barrier* const rows_barrier = reinterpret_cast<Barrier*>(memory + Memory::kBarriersAt);
  Barrier* const barriers = rows_barrier + 1;  // of the stages
  if (thread == 0) {
    for (int i = 0; i < 1 + Memory::kStages; ++i) init_barrier(rows_barrier[i], 1);
    publish_barriers();
  }
  __syncthreads();
  const auto fetch = [&](int index) {  // slices of the group's heads, one after another
    if (index < group * slices) {
      const int64_t head = key_head * group + index / slices, unit = number * in.value_heads + head;
      const int64_t image = unit * slices + index % slices;
      const int column = index % slices * kSlice, stage_number = index % Memory::kStages;
      const uint32_t stage = base + Memory::kStagesAt + stage_number * Memory::kStageBytes;
      expect_bytes(barriers[stage_number], Memory::kBulkBytes, thread);
      const auto fetch_image = [&](int offset, const void* images, int bytes) {
        fetch_bytes<kGradientThreads>(stage + offset, static_cast<const char*>(images) + image * bytes, bytes,
                                      barriers[stage_number], thread);
      };
      fetch_image(0, p.states, Memory::States::kBytes);
      fetch_image(Memory::kDStates, p.dstates, Memory::States::kBytes);
      fetch_image(Memory::kW, p.w, Memory::Slice::kBytes);
      fetch_image(Memory::kU, p.u, Memory::Slice::kBytes);
      const auto fetch_values = [&](int offset, const TokenTensor& tensor) {
        TileSource<T> source = rows_of<T>(tensor, chunk, head, values - column, p.chunk.aligned);
        source.first += column;
        fetch_tile<kGradientThreads>(TileView<T, kTokens, kSlice>{stage + offset}, source, thread);
      };
      fetch_values(Memory::kDout, p.dout);
      fetch_values(Memory::kV, in.v);
    }
    commit_copies();
  };
  {
    const int64_t unit = number * in.key_heads + key_head;
    expect_bytes(*rows_barrier, 2 * Memory::Rows::kBytes, thread);
    fetch_bytes<kGradientThreads>(k_tile.base,
                                  static_cast<const char*>(p.chunk.prepared.keys) + unit * Memory::Rows::kBytes,
                                  Memory::Rows::kBytes, *rows_barrier, thread);
    fetch_bytes<kGradientThreads>(q_tile.base,
                                  static_cast<const char*>(p.chunk.prepared.queries) + unit * Memory::Rows::kBytes,
                                  Memory::Rows::kBytes, *rows_barrier, thread);
  }
  if (Memory::kStages > 1) fetch(0);

  // The sum over a row's columns that this warp has, of an accumulator's rows times a tile's.
  const auto row_dots = [&](const Accumulator(&c)[kTiles], const TileView<T, kTokens, kKeys>& tile, Sum sum) {
    float dots[2] = {};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float low, high;
        const uint32_t at = tile.address(first_row + i * 8 + g, first_column + n * 8) + 4 * t;
        unpack_pair<T>(load_shared_word(at), low, high);
        dots[i] += c[n][2 * i] * low + c[n][2 * i + 1] * high;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      dots[i] += __shfl_xor_sync(0xffffffffu, dots[i], 1);
      dots[i] += __shfl_xor_sync(0xffffffffu, dots[i], 2);
      if (t == 0) sums[sum + half][first_row + i * 8 + g] = dots[i];
    }
  };

  Accumulator x[kTiles] = {}, y[kTiles] = {};  // of dq and dk, summed over the group's heads
  for (int i = 0; i < group; ++i) {
    const int64_t head = key_head * group + i, unit = number * in.value_heads + head;
    Accumulator do_s[kTiles] = {}, w_s[kTiles] = {}, u_g[kTiles] = {};
    Accumulator dscores[4] = {}, dm[4] = {};  // [16, 32]: the half's columns
    float state_dot = 0.0f, value_dots[2] = {};
    for (int slice = 0; slice < slices; ++slice) {
      const int index = i * slices + slice;
      if (Memory::kStages == 1) fetch(index);
      wait_for_copies<0>();
      if (slice == 0) {
        for (int j = thread; j < kFactors * kTokens; j += kGradientThreads) {
          factors[0][j] = p.chunk.prepared.factors[unit * (kFactors * kTokens) + j];
        }
      }
      publish_shared();  // before the next fetch, for which it would wait
      __syncthreads();
      wait_for_bytes(barriers[index % Memory::kStages], index / Memory::kStages);
      if (index == 0) wait_for_bytes(*rows_barrier, 0);
      if (Memory::kStages > 1) fetch(index + 1);
      const uint32_t stage = base + Memory::kStagesAt + index % Memory::kStages * Memory::kStageBytes;
      const TileView<T, kSlice, kKeys> s_tile{stage}, g_tile{stage + Memory::kDStates};
      const TileView<T, kTokens, kSlice> do_tile{stage + Memory::kDout}, w_tile{stage + Memory::kW};
      const TileView<T, kTokens, kSlice> u_tile{stage + Memory::kU}, v_tile{stage + Memory::kV};
      begin_products();
#pragma unroll
      for (int v = 0; v < kSlice / 16; ++v) {
        start_times_half(do_s, RowsOf<T, kTokens, kSlice>{do_tile}, v, s_tile, half);
        start_times_half(w_s, ColumnsOf<T, kSlice, kTokens>{w_tile}, v, s_tile, half);
        start_times_half(u_g, ColumnsOf<T, kSlice, kTokens>{u_tile}, v, g_tile, half);
        multiply_by_columns<4>(dscores, RowsOf<T, kTokens, kSlice>{do_tile}, v, u_tile, v * 16, half * 32);
        multiply_by_columns<4>(dm, ColumnsOf<T, kSlice, kTokens>{w_tile}, v, u_tile, v * 16, half * 32);
      }
      commit_products();
      const auto dot_of_pieces = [&](uint32_t a, uint32_t b) {
        const uint4 first = load_shared(a), second = load_shared(b);
        const uint32_t left[4] = {first.x, first.y, first.z, first.w};
        const uint32_t right[4] = {second.x, second.y, second.z, second.w};
        float dot = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float a_low, a_high, b_low, b_high;
          unpack_pair<T>(left[j], a_low, a_high);
          unpack_pair<T>(right[j], b_low, b_high);
          dot += a_low * b_low + a_high * b_high;
        }
        return dot;
      };
      for (int j = thread; j < kSlice * kKeys / 8; j += kGradientThreads) {
        state_dot += dot_of_pieces(s_tile.base + j * 16, g_tile.base + j * 16);
      }
#pragma unroll
      for (int v = half * 32; v < half * 32 + 32; v += 16) {  // the lane's tokens g and g + 8 of its warp's
        Fragment w_words, v_words;
        w_tile.template load_rows_first<true>(w_words, v, first_row);
        v_tile.template load_columns_first<false>(v_words, first_row, v);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float w_low, w_high, v_low, v_high;
          unpack_pair<T>(w_words[j], w_low, w_high);
          unpack_pair<T>(v_words[j], v_low, v_high);
          value_dots[j / 2] += w_low * v_low + w_high * v_high;
        }
      }
      wait_for_products<0>();
      keep(do_s);
      keep(w_s);
      keep(u_g);
      keep(dscores);
      keep(dm);
      if (Memory::kStages == 1 && slice + 1 < slices) __syncthreads();  // before the tiles are overwritten
    }

    Accumulator kk[4], qk[4];
    begin_products();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      multiply_by_rows<4>(kk, RowsOf<T, kTokens, kKeys>{k_tile}, k, k_tile, half * 32, k * 16, k == 0);
      multiply_by_rows<4>(qk, RowsOf<T, kTokens, kKeys>{q_tile}, k, k_tile, half * 32, k * 16, k == 0);
    }
    commit_products();
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      value_dots[j] += __shfl_xor_sync(0xffffffffu, value_dots[j], 1);
      value_dots[j] += __shfl_xor_sync(0xffffffffu, value_dots[j], 2);
      if (t == 0) sums[kValueDot + half][first_row + j * 8 + g] = value_dots[j];
    }
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) state_dot += __shfl_xor_sync(0xffffffffu, state_dot, offset);
    if (lane == 0) state_dots[warp] = state_dot;
    row_dots(do_s, q_tile, kQueryDot);
    row_dots(w_s, k_tile, kKeyDot);
    row_dots(u_g, k_tile, kStateDot);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = first_row + j / 2 * 8 + g;
        x[n][j] += factors[kQueryIn][row] * do_s[n][j];
        y[n][j] += factors[kKeyOut][row] * u_g[n][j] - factors[kBeta][row] * factors[kKeyIn][row] * w_s[n][j];
      }
    }
    wait_for_products<0>();
    keep(kk);
    keep(qk);

    float row_sums[2] = {}, beta_sums[2] = {};
    const float scale = static_cast<float>(in.scale);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      float column_sums[2] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = first_row + j * 8 + g;
        float own_y[2], own_n[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = half * 32 + n * 8 + 2 * t + c;
          const bool below = row > column, not_above = row >= column;
          const float decay = not_above ? exp2_fast(factors[kLogDecay][row] - factors[kLogDecay][column]) : 0.0f;
          const float key_decay = decay * factors[kKeyLength][column];
          const float score_factor = not_above ? scale * factors[kQueryLength][row] * key_decay : 0.0f;
          const float system_factor = below ? factors[kKeyLength][row] * key_decay : 0.0f;
          const float dscore = dscores[n][2 * j + c], dentry = -dm[n][2 * j + c];
          const float beta = factors[kBeta][row];
          own_y[c] = not_above ? dscore * score_factor : 0.0f;
          own_n[c] = below ? dentry * beta * system_factor : 0.0f;
          const float without_beta = below ? dentry * system_factor * kk[n][2 * j + c] : 0.0f;
          const float e = (not_above ? own_y[c] * qk[n][2 * j + c] : 0.0f) + beta * without_beta;
          row_sums[j] += e;
          beta_sums[j] += without_beta;
          column_sums[c] += e;
        }
        const int column = half * 32 + n * 8;
        store_shared(y_tile.address(row, column) + 4 * t, pack_pair<T>(own_y[0], own_y[1]));
        store_shared(n_tile.address(row, column) + 4 * t, pack_pair<T>(own_n[0], own_n[1]));
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) {
          column_sums[c] += __shfl_xor_sync(0xffffffffu, column_sums[c], offset);
        }
        if (g == 0) sums[kColumnSum + token_group][half * 32 + n * 8 + 2 * t + c] = column_sums[c];
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int offset = 1; offset < 4; offset *= 2) {
        row_sums[j] += __shfl_xor_sync(0xffffffffu, row_sums[j], offset);
        beta_sums[j] += __shfl_xor_sync(0xffffffffu, beta_sums[j], offset);
      }
      if (t == 0) {
        sums[kRowSum + half][first_row + j * 8 + g] = row_sums[j];
        sums[kBetaSum + half][first_row + j * 8 + g] = beta_sums[j];
      }
    }
    publish_shared();
    __syncthreads();

    begin_products();
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k) {
      start_times_half(x, RowsOf<T, kTokens, kTokens>{y_tile}, k, k_tile, half);
      start_times_half(y, RowsOf<T, kTokens, kTokens>{n_tile}, k, k_tile, half);
      start_times_half(y, ColumnsOf<T, kTokens, kTokens>{n_tile}, k, k_tile, half);
      start_times_half(y, ColumnsOf<T, kTokens, kTokens>{y_tile}, k, q_tile, half);
    }
    commit_products();
    if (warp == 0) {  // dg and dbeta, two tokens a lane
      float dc[2], end = 0.0f;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = 2 * lane + j;
        const auto both = [&](Sum sum) { return sums[sum][row] + sums[sum + 1][row]; };
        float column_sum = 0.0f;
#pragma unroll
        for (int rows = 0; rows < 4; ++rows) column_sum += row < rows * 16 + 16 ? sums[kColumnSum + rows][row] : 0.0f;
        const float row_sum = sums[kRowSum][row] + (row >= 32 ? sums[kRowSum + 1][row] : 0.0f);
        const float beta_sum = sums[kBetaSum][row] + (row >= 32 ? sums[kBetaSum + 1][row] : 0.0f);
        const float read = factors[kKeyIn][row] * both(kKeyDot), kept = factors[kKeyOut][row] * both(kStateDot);
        dc[j] = row_sum - column_sum + factors[kQueryIn][row] * both(kQueryDot) - factors[kBeta][row] * read - kept;
        end += kept;
        const float dbeta[1] = {both(kValueDot) - read + beta_sum};
        if (row < chunk.tokens) {
          store_from_float(p.dbeta.data, p.dbeta.dtype, (token_row + row) * in.value_heads + head, dbeta);
        }
      }
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) end += __shfl_xor_sync(0xffffffffu, end, offset);
      float dot = 0.0f;
#pragma unroll
      for (const float part : state_dots) dot += part;
      if (lane == 31) dc[1] += end + exp2_fast(factors[kLogDecay][kTokens - 1]) * dot;
      float sum = dc[0] + dc[1];  // of this lane's tokens and all after them
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const float after = __shfl_down_sync(0xffffffffu, sum, offset);
        if (lane + offset < 32) sum += after;
      }
      const float after = __shfl_down_sync(0xffffffffu, sum, 1);
      const float dg[2] = {sum, dc[1] + (lane < 31 ? after : 0.0f)};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = 2 * lane + j;
        if (row < chunk.tokens) {
          const float gate = static_cast<const float*>(in.g.data)[in.g.offset(chunk.batch, chunk.token + row, head)];
          static_cast<float*>(p.dg.data)[(token_row + row) * in.value_heads + head] =
              gate < kSmallestGate ? 0.0f : dg[j];  // nothing is left there to decay
        }
      }
    }
    wait_for_products<0>();
    keep(x);
    keep(y);
    __syncthreads();  // before the sums, factors and tiles are overwritten
  }

  if (in.l2norm_qk) {
    row_dots(x, q_tile, kQueryDot);
    row_dots(y, k_tile, kKeyDot);
    __syncthreads();
  }
  const auto write = [&](const Accumulator(&c)[kTiles], const TileView<T, kTokens, kKeys>& tile, Factor length, Sum sum,
                         void* output) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row + i * 8 + g;
      const float own = factors[length][row];
      const float along = in.l2norm_qk ? own * own * (sums[sum][row] + sums[sum + 1][row]) : 0.0f;
      T* const target = static_cast<T*>(output) + ((token_row + row) * in.key_heads + key_head) * keys;
#pragma unroll
      for (int quad = 0; quad < kTiles / 4; ++quad) {
        Fragment words;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int n = quad * 4 + j;
          float low, high;
          unpack_pair<T>(load_shared_word(tile.address(row, first_column + n * 8) + 4 * t), low, high);
          words[j] = pack_pair<T>(c[n][2 * i] - along * low, c[n][2 * i + 1] - along * high);
        }
        transpose_quad(words);
        const int column = first_column + (quad * 4 + t) * 8;
        if (row < chunk.tokens && column < keys) {
          *reinterpret_cast<uint4*>(target + column) = uint4{words[0], words[1], words[2], words[3]};
        }
      }
    }
  };
  write(x, q_tile, kQueryLength, kQueryDot, p.dq.data);
  write(y, k_tile, kKeyLength, kKeyDot, p.dk.data);
}

}  // namespace inlay::gdn::cuda
