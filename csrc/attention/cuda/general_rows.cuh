// How blocks read rows of tensors, share work between warps, and store results.
#pragma once

#include "attention/cuda/general_scores.cuh"
#include "attention/cuda/general_tile.cuh"

namespace inlay::attention::cuda {

template <int kRowTiles, int kTiles>
__device__ __forceinline__ void clear(Accumulator (&tiles)[kRowTiles][kTiles]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) tiles[m][i][0] = tiles[m][i][1] = tiles[m][i][2] = tiles[m][i][3] = 0.0f;
  }
}

// Adds up what the warps that share rows have computed, each of a part of the depth, in the same order for all.
template <int kRowTiles, int kTiles>
__device__ __forceinline__ void exchange_parts(Accumulator (&s)[kRowTiles][kTiles], uint32_t memory, int tiles,
                                               int warp, int groups) {
  const auto place = [&](int of_warp, int m, int i) {
    return memory + static_cast<uint32_t>(((of_warp * kRowTiles + m) * tiles + i) * 512 + threadIdx.x % 32 * 16);
  };
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (i >= tiles) break;
      store_shared(place(warp, m, i), *reinterpret_cast<const uint4*>(&s[m][i]));
    }
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (i >= tiles) break;
      s[m][i][0] = s[m][i][1] = s[m][i][2] = s[m][i][3] = 0.0f;
#pragma unroll 1
      for (int group = 0; group < groups; ++group) {
        const uint4 part = load_shared(place(warp / groups * groups + group, m, i));
        s[m][i][0] += __uint_as_float(part.x);
        s[m][i][1] += __uint_as_float(part.y);
        s[m][i][2] += __uint_as_float(part.z);
        s[m][i][3] += __uint_as_float(part.w);
      }
    }
  }
}

// Pieces [first, end) of a row's that are one column group's part.
struct PiecePart {
  int first, end;

  __device__ __forceinline__ PiecePart(int pieces, int group, int groups) {
    const int part = (pieces / 4 + groups - 1) / groups * 4;
    first = min(group * part, pieces);
    end = min(first + part, pieces);
  }
};

template <typename T>
__device__ __forceinline__ TileSource<T> rows_of(const TokenTensor& tensor, int batch, int token, int head, int rows,
                                                 int64_t columns) {
  const T* const first = static_cast<const T*>(tensor.data) + tensor.offset(batch, token, head);
  return {first, tensor.token_stride, max(rows, 0), static_cast<int>(columns),
          ((reinterpret_cast<uintptr_t>(first) | static_cast<uintptr_t>(tensor.token_stride * sizeof(T))) & 15) == 0};
}

// Two neighbouring values of a row to memory that is aligned to both.
template <typename T>
__device__ __forceinline__ void store_pair(T* to, float low, float high) {
  const float values[2] = {low, high};
  *reinterpret_cast<Packed<T, 2>*>(to) = pack<T>(values);
}

// The results of 16 rows, rounded and stored: `row_data(r, there)` says where column 0 of the thread's row r is.
template <typename T, int kTiles, typename RowData>
__device__ __forceinline__ void store_results(const Accumulator (&result)[kTiles], int first_column, int columns,
                                              const float (&multiplier)[2], RowData row_data) {
  const int own_column = first_column + threadIdx.x % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    T* const to = row_data(r);
    if (!to) continue;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (first_column + i * 8 >= columns) break;
      store_pair(to + own_column + i * 8, result[i][2 * r] * multiplier[r], result[i][2 * r + 1] * multiplier[r]);
    }
  }
}

}  // namespace inlay::attention::cuda
