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
//   dc_i = <q_i, x_i> - <k_i, y_i> - 2 beta_i k_in_i <k_i, (w S^T)_i> + 2 sum_j dM_ij M_ij
//     and for the last token exp(c_end) <S, G> + sum_i k_out_i <k_i, (u G^T)_i>
//   dg_i = dc_i + dc_{i+1} + ...
//
// (c_i is in an entry of row i with one sign and in those of column i with the other; x and y have the sums over rows
// and columns of such entries already, and the two terms correct the signs where both are in y.)
//
// (M's inverse needs no products of its own: inverse^T dinverse inverse^T = w u^T.)
#pragma once

#include "common/cuda/bulk.cuh"
#include "common/cuda/warpgroup.cuh"
#include "gdn/cuda/chunk.cuh"

namespace inlay::gdn::cuda {

// Sixteen warps, since one block is all that a multiprocessor has room for. Blocks that stay and fetch their next
// chunk's tiles early were much slower: more registers than there are.
inline constexpr int kGradientParts = 4;  // of the columns, each a warpgroup's; its warps have 16 tokens each
inline constexpr int kGradientWarps = 4 * kGradientParts;
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
  TokenRows v_rows, dout_rows;
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
  static constexpr int kFactorsAt = kV + Slice::kBytes;
  static constexpr int kFactorBytes = kFactors * kTokens * 4;
  static constexpr int kStageBytes = (kFactorsAt + kFactorBytes + 1023) / 1024 * 1024;
  // Of the block.
  static constexpr int kQueries = Rows::kBytes;
  static constexpr int kStagesAt = 2 * Rows::kBytes;
  static constexpr int kY = kStagesAt + kStages * kStageBytes;
  static constexpr int kN = kY + Tile<T, kTokens, kTokens>::kBytes;
  static constexpr int kSums = kN + Tile<T, kTokens, kTokens>::kBytes;
  static constexpr int kSumRows = 5 * kGradientParts;
  static constexpr int kBarriersAt = kSums + kSumRows * kTokens * 4;
  static constexpr int kBytes = kBarriersAt + 8 * (1 + kStages);
  // What comes for a stage in bulk, and as rows of tokens.
  static constexpr int kImageBytes = 2 * (States::kBytes + Slice::kBytes) + kFactorBytes;
  static constexpr int kRowBytes = 2 * Slice::kBytes;
};

// What the warps of a block add up of each token: of each kind a row of float32 [kTokens] for each part of the columns.
enum Sum : int { kRowDot, kStateDot, kSystemSum, kBetaSum, kValueDot };

// Starts c[64, kKeys / 4] += or, fresh, = a's step times that part of a tile's columns.
template <typename T, int kKeys, class A>
__device__ __forceinline__ void start_times_part(Accumulator (&c)[kKeys / 32], const A& a, int step,
                                                 const TileView<T, 64, kKeys>& tile, int part, bool fresh = false) {
  multiply_by_columns<kKeys / 32>(c, a, step, tile, step * 16, part * (kKeys / 4), fresh);
}

// The product of the eight values at each of two places in shared memory.
template <typename T>
__device__ __forceinline__ float dot_of_pieces(uint32_t a, uint32_t b) {
  const uint4 first = load_shared(a), second = load_shared(b);
  const uint32_t left[4] = {first.x, first.y, first.z, first.w}, right[4] = {second.x, second.y, second.z, second.w};
  float dot = 0.0f;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float a_low, a_high, b_low, b_high;
    unpack_pair<T>(left[j], a_low, a_high);
    unpack_pair<T>(right[j], b_low, b_high);
    dot += a_low * b_low + a_high * b_high;
  }
  return dot;
}

template <typename T, int kKeys>
__global__ void __launch_bounds__(kGradientThreads, 1) gradients_kernel(const __grid_constant__ GradientParams p) {
  using Memory = GradientMemory<T, kKeys>;
  constexpr int kTiles = kKeys / 32;  // of eight columns, that a warp has of K
  const Inputs& in = p.chunk.inputs;
  const int keys = static_cast<int>(in.key_dim), values = static_cast<int>(in.value_dim);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int token_group = warp % 4, part = warp / 4, first_row = token_group * 16, first_column = part * (kKeys / 4);
  const int64_t number = blockIdx.x / in.key_heads, key_head = blockIdx.x - number * in.key_heads;
  wait_for_predecessor();
  release_successor();
  const Chunk chunk = chunk_at(in.sequences, number);
  if (chunk.tokens == 0) return;

  char* const memory = dynamic_shared();
  const uint32_t base = shared_address(memory);
  const TileView<T, kTokens, kKeys> k_tile{base}, q_tile{base + Memory::kQueries};
  const TileView<T, kTokens, kTokens> y_tile{base + Memory::kY}, n_tile{base + Memory::kN};
  const auto sums = [&](Sum sum, int of) {
    return reinterpret_cast<float*>(memory + Memory::kSums) + (sum * kGradientParts + of) * kTokens;
  };
  __shared__ float end_dots[kGradientWarps];
  const int64_t token_row = chunk.batch * in.sequences.tokens + chunk.token;  // of dense [B * T, ...]
  const int group = static_cast<int>(in.group()), slices = (values + kSlice - 1) / kSlice;

  Barrier* const rows_barrier = reinterpret_cast<Barrier*>(memory + Memory::kBarriersAt);
  Barrier* const barriers = rows_barrier + 1;  // of the stages
  if (thread == 0) {
    for (int i = 0; i < 1 + Memory::kStages; ++i) init_barrier(rows_barrier[i], kFetchArrivals<kGradientThreads>);
    publish_barriers();
  }
  __syncthreads();
  const bool boxed = in_boxes(p.chunk, chunk);
  const auto fetch = [&](int index) {  // slices of the group's heads, one after another
    if (index >= group * slices) return;
    const int64_t head = key_head * group + index / slices, unit = number * in.value_heads + head;
    const int64_t image = unit * slices + index % slices;
    const int column = index % slices * kSlice, stage_number = index % Memory::kStages;
    const uint32_t stage = base + Memory::kStagesAt + stage_number * Memory::kStageBytes;
    Barrier& barrier = barriers[stage_number];
    expect_bytes(barrier, Memory::kImageBytes + (boxed ? Memory::kRowBytes : 0), thread);
    const auto fetch_image = [&](int offset, const void* images, int64_t number, int bytes) {
      fetch_bytes<kGradientThreads>(stage + offset, static_cast<const char*>(images) + number * bytes, bytes, barrier,
                                    thread);
    };
    const auto fetch_values = [&](int offset, const TokenTensor& tensor, const TokenRows& rows) {
      fetch_rows<kGradientThreads>(TileView<T, kTokens, kSlice>{stage + offset}, p.chunk, tensor, rows, chunk, head,
                                   column, values, barrier, thread);
    };
    fetch_image(0, p.states, image, Memory::States::kBytes);
    fetch_image(Memory::kDStates, p.dstates, image, Memory::States::kBytes);
    fetch_image(Memory::kW, p.w, image, Memory::Slice::kBytes);
    fetch_image(Memory::kU, p.u, image, Memory::Slice::kBytes);
    fetch_image(Memory::kFactorsAt, p.chunk.prepared.factors, unit, Memory::kFactorBytes);
    fetch_values(Memory::kDout, p.dout, p.dout_rows);
    fetch_values(Memory::kV, in.v, p.v_rows);
    arrive_fetched(barrier, !boxed);
  };
  expect_bytes(*rows_barrier, boxed ? 2 * Memory::Rows::kBytes : 0, thread);
  fetch_rows<kGradientThreads>(k_tile, p.chunk, in.k, p.chunk.k, chunk, key_head, 0, keys, *rows_barrier, thread);
  fetch_rows<kGradientThreads>(q_tile, p.chunk, in.q, p.chunk.q, chunk, key_head, 0, keys, *rows_barrier, thread);
  arrive_fetched(*rows_barrier, !boxed);
  if (Memory::kStages > 1) fetch(0);

  // The words of a tile that go with an accumulator's: for tile n and row i of its two.
  const auto word = [&](const TileView<T, kTokens, kKeys>& tile, int n, int i) {
    return load_shared_word(tile.address(first_row + i * 8 + g, first_column + n * 8) + 4 * t);
  };
  // This lane's part of the products of an accumulator's two rows and a tile's.
  const auto row_dots = [&](float (&dots)[2], const Accumulator(&c)[kTiles], const TileView<T, kTokens, kKeys>& tile) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float low, high;
        unpack_pair<T>(word(tile, n, i), low, high);
        dots[i] += c[n][2 * i] * low + c[n][2 * i + 1] * high;
      }
    }
  };
  const auto store_sums = [&](Sum sum, const float (&lanes)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float total = lanes[i];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      if (t == 0) sums(sum, part)[first_row + i * 8 + g] = total;
    }
  };
  const auto add_scaled = [&](Accumulator(&to)[kTiles], const Accumulator(&c)[kTiles], const float (&rows)[2]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) to[n][j] += rows[j / 2] * c[n][j];
    }
  };

  const float (*factors)[kTokens] = nullptr;   // of the head at hand; lengths are the same for all
  Accumulator x[kTiles] = {}, y[kTiles] = {};  // of dq and dk, summed over the group's heads
  float earlier_dots[2] = {};                  // of x and q less those of y and k, before this head
  for (int i = 0; i < group; ++i) {
    const int64_t head = key_head * group + i;
    Accumulator dscores[2] = {}, dm[2] = {};  // [16, 16]: the part's columns
    float end_dot = 0.0f, value_dots[2] = {}, state_dots[2] = {};
    for (int slice = 0; slice < slices; ++slice) {
      const int index = i * slices + slice;
      if (Memory::kStages == 1) fetch(index);
      wait_at(barriers[index % Memory::kStages], index / Memory::kStages);
      if (index == 0) wait_at(*rows_barrier, 0);
      if (Memory::kStages > 1) {
        __syncthreads();  // all are done with the slice before
        fetch(index + 1);
      }
      const uint32_t stage = base + Memory::kStagesAt + index % Memory::kStages * Memory::kStageBytes;
      factors = reinterpret_cast<const float (*)[kTokens]>(memory + (stage - base) + Memory::kFactorsAt);
      const TileView<T, kSlice, kKeys> s_tile{stage}, g_tile{stage + Memory::kDStates};
      const TileView<T, kTokens, kSlice> do_tile{stage + Memory::kDout}, w_tile{stage + Memory::kW};
      const TileView<T, kTokens, kSlice> u_tile{stage + Memory::kU}, v_tile{stage + Memory::kV};
      Accumulator do_s[kTiles], w_s[kTiles];
      begin_products();
#pragma unroll
      for (int v = 0; v < kSlice / 16; ++v) {
        start_times_part(do_s, RowsOf<T, kTokens, kSlice>{do_tile}, v, s_tile, part, v == 0);
        multiply_by_columns<2>(dscores, RowsOf<T, kTokens, kSlice>{do_tile}, v, u_tile, v * 16, part * 16);
        multiply_by_columns<2>(dm, ColumnsOf<T, kSlice, kTokens>{w_tile}, v, u_tile, v * 16, part * 16);
      }
      commit_products();
#pragma unroll
      for (int v = 0; v < kSlice / 16; ++v) {
        start_times_part(w_s, ColumnsOf<T, kSlice, kTokens>{w_tile}, v, s_tile, part, v == 0);
      }
      commit_products();
      float state_dot = 0.0f;
#pragma unroll 2
      for (int j = thread; j < kSlice * kKeys / 8; j += kGradientThreads) {
        state_dot += dot_of_pieces<T>(s_tile.base + j * 16, g_tile.base + j * 16);
      }
      end_dot += exp2_fast(factors[kLogDecay][kTokens - 1]) * state_dot;
      {
        Fragment w_words, v_words;
        w_tile.template load_rows_first<true>(w_words, part * 16, first_row);
        v_tile.template load_columns_first<false>(v_words, first_row, part * 16);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float w_low, w_high, v_low, v_high;
          unpack_pair<T>(w_words[j], w_low, w_high);
          unpack_pair<T>(v_words[j], v_low, v_high);
          value_dots[j / 2] += w_low * v_low + w_high * v_high;
        }
      }
      float query_in[2], key_out[2], written[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = first_row + j * 8 + g;
        query_in[j] = factors[kQueryIn][row];
        key_out[j] = factors[kKeyOut][row];
        written[j] = -factors[kBeta][row] * factors[kKeyIn][row];
      }
      wait_for_products<1>();
      keep(do_s);
      add_scaled(x, do_s, query_in);
      Accumulator(&u_g)[kTiles] = do_s;
      begin_products();
#pragma unroll
      for (int v = 0; v < kSlice / 16; ++v) {
        start_times_part(u_g, ColumnsOf<T, kSlice, kTokens>{u_tile}, v, g_tile, part, v == 0);
      }
      commit_products();
      wait_for_products<1>();
      keep(w_s);
      row_dots(state_dots, w_s, k_tile);
      add_scaled(y, w_s, written);
      wait_for_products<0>();
      keep(u_g);
      keep(dscores);
      keep(dm);
      float kept[2] = {};
      row_dots(kept, u_g, k_tile);
      end_dot += key_out[0] * kept[0] + key_out[1] * kept[1];
      add_scaled(y, u_g, key_out);
      if (Memory::kStages == 1 && slice + 1 < slices) __syncthreads();  // before the tiles are overwritten
    }

    Accumulator kk[2];
    begin_products();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      multiply_by_rows<2>(kk, RowsOf<T, kTokens, kKeys>{k_tile}, k, k_tile, part * 16, k * 16, k == 0);
    }
    commit_products();
    store_sums(kStateDot, state_dots);
    store_sums(kValueDot, value_dots);
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) end_dot += __shfl_xor_sync(0xffffffffu, end_dot, offset);
    if (lane == 0) end_dots[warp] = end_dot;
    wait_for_products<0>();
    keep(kk);

    // The block [16 tokens, 16 columns] of Y and N that this warp has; none of it is above the diagonal, or some, or
    // all.
    float system_sums[2] = {}, beta_sums[2] = {};
    const float scale = static_cast<float>(in.scale);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = first_row + j * 8 + g;
        float own_y[2] = {}, own_n[2] = {};
        if (part <= token_group) {
          const float row_decay = factors[kLogDecay][row], beta = factors[kBeta][row];
          const float q_row = scale * factors[kQueryLength][row], k_row = factors[kKeyLength][row];
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int column = part * 16 + n * 8 + 2 * t + c;
            const bool not_above = part < token_group || row >= column, below = part < token_group || row > column;
            const float decay = exp2_fast(row_decay - factors[kLogDecay][column]) * factors[kKeyLength][column];
            // Selected, not multiplied by zero: decays above the diagonal may overflow.
            own_y[c] = not_above ? dscores[n][2 * j + c] * q_row * decay : 0.0f;
            const float without_beta = below ? -dm[n][2 * j + c] * k_row * decay : 0.0f;
            own_n[c] = beta * without_beta;
            beta_sums[j] += without_beta * kk[n][2 * j + c];
          }
        }
        const int column = part * 16 + n * 8;
        const uint32_t n_words = pack_pair<T>(own_n[0], own_n[1]);
        store_shared(y_tile.address(row, column) + 4 * t, pack_pair<T>(own_y[0], own_y[1]));
        store_shared(n_tile.address(row, column) + 4 * t, n_words);
        // What y gets of it is rounded: the correction must be so too.
        unpack_pair<T>(n_words, own_n[0], own_n[1]);
        if (part <= token_group) system_sums[j] += own_n[0] * kk[n][2 * j] + own_n[1] * kk[n][2 * j + 1];
      }
    }
    store_sums(kSystemSum, system_sums);
    store_sums(kBetaSum, beta_sums);
    publish_shared();
    __syncthreads();

    begin_products();
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k) {
      start_times_part(x, RowsOf<T, kTokens, kTokens>{y_tile}, k, k_tile, part);
      start_times_part(y, RowsOf<T, kTokens, kTokens>{n_tile}, k, k_tile, part);
      start_times_part(y, ColumnsOf<T, kTokens, kTokens>{n_tile}, k, k_tile, part);
      start_times_part(y, ColumnsOf<T, kTokens, kTokens>{y_tile}, k, q_tile, part);
    }
    commit_products();
    wait_for_products<0>();
    keep(x);
    keep(y);
    {
      float dots[2] = {}, key_dots[2] = {};
      row_dots(dots, x, q_tile);
      row_dots(key_dots, y, k_tile);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float all = dots[j] - key_dots[j];
        dots[j] = all - earlier_dots[j];
        earlier_dots[j] = all;
      }
      store_sums(kRowDot, dots);
    }
    __syncthreads();
    if (warp == 0) {  // dg and dbeta, two tokens a lane; nobody changes what it reads before the next barrier
      float dc[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = 2 * lane + j;
        const auto total = [&](Sum sum) {
          float all = 0.0f;
#pragma unroll
          for (int of = 0; of < kGradientParts; ++of) all += sums(sum, of)[row];
          return all;
        };
        const float read = factors[kKeyIn][row] * total(kStateDot);
        dc[j] = total(kRowDot) + 2.0f * (total(kSystemSum) - factors[kBeta][row] * read);
        const float dbeta[1] = {total(kValueDot) - read + total(kBetaSum)};
        if (row < chunk.tokens) {
          store_from_float(p.dbeta.data, p.dbeta.dtype, (token_row + row) * in.value_heads + head, dbeta);
        }
      }
      if (lane == 31) {
#pragma unroll
        for (const float dot : end_dots) dc[1] += dot;
      }
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
    if (Memory::kStages == 1) __syncthreads();
  }

  if (in.l2norm_qk) {
    float dots[2] = {}, key_dots[2] = {};
    row_dots(dots, x, q_tile);
    row_dots(key_dots, y, k_tile);
    __syncthreads();
    store_sums(kRowDot, dots);
    store_sums(kStateDot, key_dots);
    __syncthreads();
  }
  const auto write = [&](const Accumulator(&c)[kTiles], const TileView<T, kTokens, kKeys>& tile, Factor length, Sum sum,
                         void* output) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row + i * 8 + g;
      const float own = factors[length][row];
      float along = 0.0f;
      if (in.l2norm_qk) {
#pragma unroll
        for (int of = 0; of < kGradientParts; ++of) along += sums(sum, of)[row];
        along *= own * own;
      }
      T* const target = static_cast<T*>(output) + ((token_row + row) * in.key_heads + key_head) * keys;
      uint32_t words[kTiles];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        float low, high;
        unpack_pair<T>(word(tile, n, i), low, high);
        words[n] = pack_pair<T>(c[n][2 * i] - along * low, c[n][2 * i + 1] - along * high);
      }
      if constexpr (kTiles % 4 == 0) {
#pragma unroll
        for (int n = 0; n < kTiles; n += 4) {
          Fragment quad = {words[n], words[n + 1], words[n + 2], words[n + 3]};
          transpose_quad(quad);
          const int column = first_column + (n + t) * 8;
          if (row < chunk.tokens && column < keys) {
            *reinterpret_cast<uint4*>(target + column) = uint4{quad[0], quad[1], quad[2], quad[3]};
          }
        }
      } else {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const int column = first_column + n * 8 + 2 * t;
          if (row < chunk.tokens && column < keys) *reinterpret_cast<uint32_t*>(target + column) = words[n];
        }
      }
    }
  };
  write(x, q_tile, kQueryLength, kRowDot, p.dq.data);
  write(y, k_tile, kKeyLength, kStateDot, p.dk.data);
}

}  // namespace inlay::gdn::cuda
