// What becomes of a tile's rounded sums, which lie in shared memory in squares of 64 by 64: rows are read and written
// in pieces of eight values, neighbouring lanes' side by side.
#pragma once

#include "moe/cuda/activation.cuh"
#include "moe/cuda/row_arguments.h"
#include "moe/cuda/tile_ring.cuh"

namespace inlay::moe::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <typename T>
using Square = TileView<T, 64, 64>;

// 16 rows of a group's results, which a warp stores.
struct BlockRows {
  int first;                 // of the square
  int count;                 // that are no padding, of the tile from here on
  int64_t padded, unpadded;  // where the first one is, among padded rows and among those in their order

  __device__ BlockRows(const RowTile& tile, int group, int block)
      : first(block * 16),
        count(tile.rows - group * 64 - first),
        padded(tile.first_padded + tile.row + group * 64 + first),
        unpadded(tile.first_row + tile.row + group * 64 + first) {}
};

template <typename T>
__device__ __forceinline__ float bias_at(const ExpertMatrices& bias, int64_t index) {
  return bias.dtype == DType::f32 ? static_cast<const float*>(bias.data)[index]
                                  : to_float(static_cast<const T*>(bias.data)[index]);
}

// Adds each column's bias to sums.
template <typename T>
__device__ __forceinline__ void add_bias(const RowProductArguments& p, const RowTile& tile, bool halves,
                                         Accumulator (&c)[kTileColumns / 8]) {
  const int64_t expert = tile.expert * p.bias.expert_stride;
#pragma unroll
  for (int i = 0; i < kTileColumns / 8; ++i) {
    const int in_box = i % 8 * 8 + threadIdx.x % 4 * 2, box = i / 8;
    const int in_half = tile.column_tile * (kTileColumns / 2) + box / 2 * 64 + in_box;
    const int column =
        halves ? box % 2 * p.intermediate + in_half : tile.column_tile * kTileColumns + i * 8 + in_box % 8;
    const int end = halves ? (box % 2 + 1) * p.intermediate : p.width;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float value = column + j < end ? bias_at<T>(p.bias, expert + column + j) : 0.0f;
      c[i][j] += value;
      c[i][2 + j] += value;
    }
  }
}

// Eight neighbouring values of a row, as they are read and written.
template <typename T>
__device__ __forceinline__ void unpack_piece(const uint4& piece, float (&values)[8]) {
  unpack_pair<T>(piece.x, values[0], values[1]);
  unpack_pair<T>(piece.y, values[2], values[3]);
  unpack_pair<T>(piece.z, values[4], values[5]);
  unpack_pair<T>(piece.w, values[6], values[7]);
}
template <typename T>
__device__ __forceinline__ uint4 pack_piece(const float (&values)[8]) {
  return make_uint4(pack_pair<T>(values[0], values[1]), pack_pair<T>(values[2], values[3]),
                    pack_pair<T>(values[4], values[5]), pack_pair<T>(values[6], values[7]));
}
template <typename T>
__device__ __forceinline__ void write_piece(T* row, int column, int end, const uint4& piece) {
  if (column < end) store_global(row + column, piece);
}
template <typename T>
__device__ __forceinline__ uint4 read_piece(const T* row, int column, int end, bool wanted) {
  return wanted && column < end ? *reinterpret_cast<const uint4*>(row + column) : make_uint4(0, 0, 0, 0);
}

// Where a lane's eight activations have their gates, and what they gate, or, in turns, the first and the last four of
// both. Ungated there is no second. `end` is where columns of their kind end.
struct GatePlaces {
  int first, second, first_end, second_end;

  __device__ GatePlaces(const RowProductArguments& p, bool in_turns, int activation) {
    first = in_turns ? 2 * activation : activation;
    second = in_turns ? first + 8 : p.intermediate + activation;
    first_end = in_turns ? 2 * p.intermediate : p.intermediate;
    second_end = p.gating.gated ? 2 * p.intermediate : 0;
  }
};

// Eight gates, and what they gate, of two pieces that lie as GatePlaces says; or the other way round.
template <typename T>
__device__ __forceinline__ void unpack_gates(const uint4 (&pieces)[2], bool in_turns, float (&gates)[8],
                                             float (&ups)[8]) {
  float values[2][8];
  unpack_piece<T>(pieces[0], values[0]);
  unpack_piece<T>(pieces[1], values[1]);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    gates[i] = in_turns ? values[i / 4][i % 4 * 2] : values[0][i];
    ups[i] = in_turns ? values[i / 4][i % 4 * 2 + 1] : values[1][i];
  }
}
template <typename T>
__device__ __forceinline__ void pack_gates(const float (&gates)[8], const float (&ups)[8], bool in_turns,
                                           uint4 (&pieces)[2]) {
  float values[2][8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    values[0][i] = in_turns ? (i % 2 ? ups : gates)[i / 2] : gates[i];
    values[1][i] = in_turns ? (i % 2 ? ups : gates)[4 + i / 2] : ups[i];
  }
  pieces[0] = pack_piece<T>(values[0]);
  pieces[1] = pack_piece<T>(values[1]);
}

// Most models have silu, gates apart, and no limit. Where that is known, `kPlain`, two warps are fast enough to be done
// when the next tile is multiplied: any question more for each activation makes all others wait.
__device__ __forceinline__ bool is_plain(const RowProductArguments& p) {
  return p.gating.activation == Activation::silu && p.halves && p.gating.limit > 3.0e38;
}

// Activations of eight pairs, in the place of the gates.
template <typename T, bool kPlain>
__device__ __forceinline__ void activate_piece(const Gating& gating, float (&gates)[8], const float (&ups)[8]) {
  if constexpr (kPlain) {
#pragma unroll
    for (int i = 0; i < 8; ++i) gates[i] = activated<T, Activation::silu>(gates[i]).value * ups[i];
  } else {
    with_activation(gating.activation, [&](auto kind) {
#pragma unroll
      for (int i = 0; i < 8; ++i) gates[i] = activate_as<T, decltype(kind)::value>(gating, gates[i], ups[i]);
    });
  }
}

// With dA' in `gradients` and a row's weight w: a w in their place, gradients in the place of gates and ups. Adds to
// the sum of dA' a.
template <typename T, bool kPlain>
__device__ __forceinline__ void activate_piece_backward(const Gating& gating, float weight, float (&gradients)[8],
                                                        float (&gates)[8], float (&ups)[8], float& sum) {
  const auto use = [&](int i, float value, float dgate, float dup) {
    sum = fmaf(gradients[i], value, sum);
    gradients[i] = value * weight;
    gates[i] = dgate;
    ups[i] = dup;
  };
  if constexpr (kPlain) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const ValueAndSlope f = activated<T, Activation::silu>(gates[i]);
      const float da = gradients[i] * weight;
      use(i, f.value * ups[i], da * f.slope * ups[i], da * f.value);
    }
  } else {
    with_activation(gating.activation, [&](auto kind) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float dgate, dup;
        const float value =
            activate_backward_as<T, decltype(kind)::value>(gating, gates[i], ups[i], gradients[i] * weight, dgate, dup);
        use(i, value, dgate, dup);
      }
    });
  }
}

// The first product's: h, and activations of h as it was rounded. `results`: squares take turns between gates and what
// they gate, where these are apart.
template <typename T, bool kPlain>
__device__ __forceinline__ void store_activations(const RowProductArguments& p, const BlockRows& rows,
                                                  const RowTile& tile, uint32_t results) {
  const bool gated = kPlain || p.gating.gated, in_turns = !kPlain && gated && !p.halves;
  const int width = gated ? 2 * p.intermediate : p.intermediate, lane = threadIdx.x % 32, part = lane % 8 * 8;
#pragma unroll 1
  for (int pair = 0; pair < 2; ++pair) {  // of squares
    const Square<T> first{results + pair * 2 * kSquareBytes}, second{first.base + kSquareBytes};
    // In turns, a lane's two pieces are neighbours; ungated, they are of columns 64 apart.
    const Square<T> of_turn = part < 32 ? first : second;
    const int in_square = 2 * part % 64;
    const int activation = tile.column_tile * (gated ? 128 : 256) + pair * (gated ? 64 : 128) + part;
    const GatePlaces at(p, in_turns, activation);
#pragma unroll(kPlain ? 2 : 1)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 8 + 4 * i, in_rows = rows.first + row;
      const bool real = row < rows.count;
      const uint4 pieces[2] = {
          load_shared(in_turns ? of_turn.address(in_rows, in_square) : first.address(in_rows, part)),
          load_shared(in_turns ? of_turn.address(in_rows, in_square + 8) : second.address(in_rows, part))};
      if (p.h && real) {
        T* const h = static_cast<T*>(p.h) + (rows.unpadded + row) * width;
        write_piece(h, at.first, at.first_end, pieces[0]);
        write_piece(h, gated ? at.second : activation + 64, width, pieces[1]);
      }
      if (!p.a) continue;
      T* const a = static_cast<T*>(p.a) + (rows.padded + row) * p.intermediate;
      float gates[8], ups[8], none[8] = {};
      unpack_gates<T>(pieces, in_turns, gates, ups);
#pragma unroll
      for (int j = 0; j < 8; ++j) {  // a bias may have reached padding; of 0, every activation is 0
        gates[j] = real ? gates[j] : 0.0f;
        ups[j] = real ? ups[j] : 0.0f;
      }
      activate_piece<T, kPlain>(p.gating, gates, ups);
      write_piece(a, activation, p.intermediate, pack_piece<T>(gates));
      if (gated) continue;
      activate_piece<T, kPlain>(p.gating, ups, none);
      write_piece(a, activation + 64, p.intermediate, pack_piece<T>(ups));
    }
  }
}

// What a warp asks for ahead, of the 16 rows that it will have next: few loads are under way at a time, and to wait for
// memory with each would take longer than the products. h comes to the L2 cache; a lane gets one row's weight.
template <typename T>
__device__ __forceinline__ float look_ahead(const RowProductArguments& p, const RowTile& tile, int first_row) {
  const bool gated = p.gating.gated, in_turns = gated && !p.halves;
  const int width = gated ? 2 * p.intermediate : p.intermediate, times = in_turns ? 2 : 1;
  const int first = tile.column_tile * kTileColumns, lane = threadIdx.x % 32;
  const int64_t unpadded = static_cast<int64_t>(tile.first_row) + tile.row + first_row;
  const int row = lane / 2, half = lane % 2;
  if (first_row + row < tile.rows && (half == 0 || p.halves)) {
    const int64_t at = (unpadded + row) * width + first * times + half * p.intermediate;
    prefetch_bytes_to_l2(static_cast<const T*>(p.saved_h) + at,
                         min(kTileColumns, p.intermediate - first) * times * static_cast<int>(sizeof(T)));
  }
  const int own = lane % 16;
  if (first_row + own >= tile.rows) return 0.0f;
  if (!p.weights.data) return 1.0f;
  const int slot = p.slots[unpadded + own];
  return p.weights.dtype == DType::f32 ? static_cast<const float*>(p.weights.data)[slot]
                                       : to_float(static_cast<const T*>(p.weights.data)[slot]);
}

// The gradient's: with dA' the sums, a row's weight w, and a its activation: a w, dh, and <dA', a>. dA' is rounded, as
// it is where nothing is fused. h is on its way while `wait` waits for the sums, and while the square before is used.
// `own_weight` is look_ahead()'s. Two rows of a lane are worked on together, and nothing branches, so that the one warp
// that a scheduler has for this always has something to start.
template <typename T, bool kPlain, class Wait>
__device__ __forceinline__ void store_activation_gradients(const RowProductArguments& p, const BlockRows& rows,
                                                           const RowTile& tile, uint32_t results, float own_weight,
                                                           Wait wait) {
  constexpr int kRows = 4, kTogether = kPlain ? 2 : 1;  // rows of a lane: every fourth from lane / 8
  const bool in_turns = !kPlain && p.gating.gated && !p.halves;
  const int width = kPlain || p.gating.gated ? 2 * p.intermediate : p.intermediate, lane = threadIdx.x % 32;
  const int first_activation = tile.column_tile * kTileColumns + lane % 8 * 8;
  float weight[kRows], sum[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    sum[i] = 0.0f;
    weight[i] = __shfl_sync(0xffffffffu, own_weight, lane / 8 + 4 * i);
  }
  const int64_t first_row = rows.unpadded + lane / 8, first_padded = rows.padded + lane / 8;
  const T* const saved = static_cast<const T*>(p.saved_h) + first_row * width;
  T* const dh = static_cast<T*>(p.dh) + first_padded * width;
  T* const a = static_cast<T*>(p.a) + first_padded * p.intermediate;
  uint4 pieces[kRows][2];
  const auto read = [&](int i, int square) {
    const GatePlaces at(p, in_turns, first_activation + square * 64);
    const bool real = lane / 8 + 4 * i < rows.count && square < kBoxes;
    pieces[i][0] = read_piece(saved + 4 * i * width, at.first, at.first_end, real);
    pieces[i][1] = read_piece(saved + 4 * i * width, at.second, at.second_end, real);
  };
#pragma unroll
  for (int i = 0; i < kRows; ++i) read(i, 0);
  wait();
#pragma unroll 1
  for (int square = 0; square < kBoxes; ++square) {
    const int activation = first_activation + square * 64;
    const GatePlaces at(p, in_turns, activation);
    const int first_end = p.dh ? at.first_end : 0, second_end = p.dh ? at.second_end : 0;
    const int a_end = p.a ? p.intermediate : 0;
    const Square<T> sums{results + square * kSquareBytes};
#pragma unroll
    for (int first = 0; first < kRows; first += kTogether) {
      float gradients[kTogether][8], gates[kTogether][8], ups[kTogether][8];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int i = first + j;
        unpack_piece<T>(load_shared(sums.address(rows.first + lane / 8 + 4 * i, lane % 8 * 8)), gradients[j]);
        unpack_gates<T>(pieces[i], in_turns, gates[j], ups[j]);
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) read(first + j, square + 1);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        activate_piece_backward<T, kPlain>(p.gating, weight[first + j], gradients[j], gates[j], ups[j], sum[first + j]);
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int i = first + j;
        uint4 slopes[2];
        pack_gates<T>(gates[j], ups[j], in_turns, slopes);
        write_piece(dh + 4 * i * width, at.first, first_end, slopes[0]);
        write_piece(dh + 4 * i * width, at.second, second_end, slopes[1]);
        write_piece(a + 4 * i * p.intermediate, activation, a_end, pack_piece<T>(gradients[j]));
      }
    }
  }
  if (!p.weight_parts) return;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int offset = 1; offset < 8; offset *= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], offset);
    if (lane % 8 == 0) p.weight_parts[tile.column_tile * p.capacity + first_padded + 4 * i] = sum[i];
  }
}

#endif

}  // namespace inlay::moe::cuda
