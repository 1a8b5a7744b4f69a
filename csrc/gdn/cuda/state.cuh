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

}  // namespace inlay::gdn::cuda
