// A warp's 16 columns of a state S [K, V], in registers and float32: rows of S^T, as a product leaves them.
#pragma once

#include "common/cuda/warpgroup.cuh"
#include "gdn/cuda/chunk.cuh"

namespace inlay::gdn::cuda {

template <int kKeys>
struct StateColumns {
  Accumulator tiles[kKeys / 8];

  // Calls use(element's offset in [K, V], entry) for what this lane has of it.
  template <class Use>
  __device__ void for_each(int keys, int values, int column, Use use) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int tile = 0; tile < kKeys / 8; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = tile * 8 + 2 * t + i % 2, own_column = column + g + i / 2 * 8;
        if (row < keys && own_column < values) use(row * values + own_column, tiles[tile][i]);
      }
    }
  }

  // Of an absent state: zeros.
  __device__ void load(const StateTensor& from, int64_t offset, int keys, int values, int column) {
#pragma unroll
    for (Accumulator& tile : tiles) {
#pragma unroll
      for (float& entry : tile) entry = 0.0f;
    }
    if (!from.data) return;
    if (from.dtype == DType::bf16) {
      const auto* const data = static_cast<const __nv_bfloat16*>(from.data) + offset;
      for_each(keys, values, column, [&](int index, float& entry) { entry = to_float(data[index]); });
    } else {
      const auto* const data = static_cast<const float*>(from.data) + offset;
      for_each(keys, values, column, [&](int index, float& entry) { entry = data[index]; });
    }
  }

  __device__ void store(const StateTensor& to, int64_t offset, int keys, int values, int column) {
    if (to.dtype == DType::bf16) {
      auto* const data = static_cast<__nv_bfloat16*>(to.data) + offset;
      for_each(keys, values, column, [&](int index, float& entry) { data[index] = from_float<__nv_bfloat16>(entry); });
    } else {
      auto* const data = static_cast<float*>(to.data) + offset;
      for_each(keys, values, column, [&](int index, float& entry) { data[index] = entry; });
    }
  }

  // As an operand whose columns are K.
  template <typename T>
  __device__ void round(Fragment (&s)[kKeys / 16]) const {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Accumulator& tile = tiles[2 * k + i / 2];
        s[k][i] = pack_pair<T>(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
      }
    }
  }

  // Rounded, to rows of [V, K], 16 bytes a lane.
  template <typename T>
  __device__ static void store_rows(T* states, const Fragment (&s)[kKeys / 16], int keys, int values, int column) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int quad = 0; quad < kKeys / 32; ++quad) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Fragment words = {s[2 * quad][half], s[2 * quad][half + 2], s[2 * quad + 1][half], s[2 * quad + 1][half + 2]};
        transpose_quad(words);
        const int row = column + half * 8 + g, first = quad * 32 + t * 8;
        if (row < values && first < keys) {
          *reinterpret_cast<uint4*>(states + row * keys + first) = uint4{words[0], words[1], words[2], words[3]};
        }
      }
    }
  }

  __device__ void scale(float factor) {
#pragma unroll
    for (Accumulator& tile : tiles) {
#pragma unroll
      for (float& entry : tile) entry *= factor;
    }
  }

  // Starts S^T += x^T rows, with x^T in registers and rows [kTokens, K].
  template <typename T>
  __device__ __forceinline__ void start_adding(const Fragment (&x)[kTokens / 16],
                                               const TileView<T, kTokens, kKeys>& rows) {
#pragma unroll
    for (int panel = 0; panel < kKeys / 64; ++panel) {
#pragma unroll
      for (int k = 0; k < kTokens / 16; ++k) {
        multiply_by_columns<8>(tiles + panel * 8, InRegisters{x}, k, rows, k * 16, panel * 64);
      }
    }
  }
};

// x^T [16, kTokens] as columns of a tile that this warp alone uses, all of whose reads of them are done.
template <typename T, int kColumns>
__device__ inline void store_columns(const TileView<T, kTokens, kColumns>& tile, int column,
                                     const Fragment (&x)[kTokens / 16]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  __syncwarp();
#pragma unroll
  for (int k = 0; k < kTokens / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = k * 16 + i / 2 * 8 + g, first = column + i % 2 * 8;
      store_shared(tile.address(row, first) + 4 * t, transpose_matrix(x[k][i]));
    }
  }
  __syncwarp();
}

}  // namespace inlay::gdn::cuda
