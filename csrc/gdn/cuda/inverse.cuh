// The inverse of 1 + M for a strictly lower triangular M of [64, 64] float32, by blocks: those of 16 on the diagonal by
// forward substitution, the rest by
//   [A 0; M B]^-1 = [A^-1 0; -B^-1 M A^-1 B^-1]
// from 16 to 32 to 64. A series in M would lose all digits for keys that resemble each other. The products are of
// values split into two bfloat16, which keeps 16 of their bits.
#pragma once

#include "common/cuda/mma.cuh"

namespace inlay::gdn::cuda {

using namespace inlay::cuda;

inline constexpr int kInverseStride = 68;  // of the matrix in shared memory: rows four banks apart

// A value as the sum of two.
struct SplitFragment {
  Fragment high, low;
};

__device__ inline void split_pair(float x, float y, uint32_t& high, uint32_t& low) {
  high = pack_pair<__nv_bfloat16>(x, y);
  float x_high, y_high;
  unpack_pair<__nv_bfloat16>(high, x_high, y_high);
  low = pack_pair<__nv_bfloat16>(x - x_high, y - y_high);
}

// [16, 16] from (row, column) as an `a`.
__device__ inline void load_a(SplitFragment& a, const float* matrix, int row, int column) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair =
        *reinterpret_cast<const float2*>(&matrix[(row + g + i % 2 * 8) * kInverseStride + column + 2 * t + i / 2 * 8]);
    split_pair(pair.x, pair.y, a.high[i], a.low[i]);
  }
}

// [16, 16] from (row, column) as two `b`.
__device__ inline void load_b(SplitFragment& b, const float* matrix, int row, int column) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* const first = &matrix[(row + 2 * t + i % 2 * 8) * kInverseStride + column + g + i / 2 * 8];
    split_pair(first[0], first[kInverseStride], b.high[i], b.low[i]);
  }
}

// Two tiles c[16, 8].
__device__ inline void multiply_add_split(Accumulator (&c)[2], const SplitFragment& a, const SplitFragment& b) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    multiply_add<__nv_bfloat16>(c[i], a.high, b.low[2 * i], b.low[2 * i + 1]);
    multiply_add<__nv_bfloat16>(c[i], a.low, b.high[2 * i], b.high[2 * i + 1]);
    multiply_add<__nv_bfloat16>(c[i], a.high, b.high[2 * i], b.high[2 * i + 1]);
  }
}

// One warp's rows [16, kSize] at `row` of -B^-1 M A^-1, of which it keeps columns [16] from `column` (relative to A's).
// A lies at (corner, corner), B at (corner + kSize, corner + kSize).
template <int kSize>
__device__ inline void merge(Accumulator (&result)[2], const float* matrix, int corner, int row, int column) {
  Accumulator left[kSize / 16][2] = {};  // B^-1 M
  const int below = corner + kSize;
#pragma unroll
  for (int k = 0; k < kSize; k += 16) {
    if (k > row) continue;  // B^-1 is triangular
    SplitFragment a;
    load_a(a, matrix, below + row, below + k);
#pragma unroll
    for (int n = 0; n < kSize; n += 16) {
      SplitFragment b;
      load_b(b, matrix, below + k, corner + n);
      multiply_add_split(left[n / 16], a, b);
    }
  }
#pragma unroll
  for (int k = 0; k < kSize; k += 16) {
    if (k < column) continue;  // and so is A^-1
    SplitFragment a, b;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Accumulator& c = left[k / 16][i / 2];
      split_pair(-c[i % 2 * 2], -c[i % 2 * 2 + 1], a.high[i], a.low[i]);
    }
    load_b(b, matrix, corner + k, corner + column);
    multiply_add_split(result, a, b);
  }
}

__device__ inline void store_result(float* matrix, int row, int column, const Accumulator (&c)[2]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float* const target = &matrix[(row + g) * kInverseStride + column + i * 8 + 2 * t];
    *reinterpret_cast<float2*>(target) = make_float2(c[i][0], c[i][1]);
    *reinterpret_cast<float2*>(target + 8 * kInverseStride) = make_float2(c[i][2], c[i][3]);
  }
}

// In place, by four warps. The matrix must be visible to all; the result is after a barrier. Nothing above the diagonal
// is read; blocks of 16 above it are not written.
__device__ inline void invert(float* matrix) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  {  // each warp a block on the diagonal, each lane one of its columns
    float* const block = matrix + warp * 16 * (kInverseStride + 1);
    float column[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float sum = i == lane % 16 ? 1.0f : 0.0f;
#pragma unroll
      for (int j = 0; j < i; ++j) sum -= block[i * kInverseStride + j] * column[j];
      column[i] = sum;
    }
    __syncwarp();
    if (lane < 16) {
#pragma unroll
      for (int i = 0; i < 16; ++i) block[i * kInverseStride + lane] = column[i];
    }
  }
  __syncthreads();
  if (warp < 2) {
    Accumulator result[2] = {};
    merge<16>(result, matrix, warp * 32, 0, 0);
    __syncwarp();
    store_result(matrix, warp * 32 + 16, warp * 32, result);
  }
  __syncthreads();
  Accumulator result[2] = {};
  merge<32>(result, matrix, 0, warp / 2 * 16, warp % 2 * 16);
  __syncthreads();
  store_result(matrix, 32 + warp / 2 * 16, warp % 2 * 16, result);
}

}  // namespace inlay::gdn::cuda
