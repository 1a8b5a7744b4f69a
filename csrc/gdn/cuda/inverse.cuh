// The inverse of 1 + M for a strictly lower triangular M of [64, 64] float32, by blocks: those of 16 on the diagonal by
// forward substitution, the rest by
//   [A 0; M B]^-1 = [A^-1 0; -B^-1 M A^-1 B^-1]
// from 16 to 32 to 64. A series in M would lose all digits for keys that resemble each other. The products are of tf32
// values, which have at least as many digits as the result has when it is rounded to 16 bits: whatever lies outside of
// the blocks on the diagonal must be such values, and so are all of the result's.
#pragma once

#include "common/cuda/mma.cuh"

namespace inlay::gdn::cuda {

using namespace inlay::cuda;

inline constexpr int kInverseStride = 68;  // of the matrix in shared memory: rows four banks apart

// A 16x16 block as two operands of eight values of the summed dimension each; those of step i are, for lane 4 g + t,
// its columns (of an `a`) or rows (of a `b`) 8 i + 2 t and 8 i + 2 t + 1.
using BlockA = float[2][4];
using BlockB = float[2][2][2];  // [step][tile of 8 columns]

__device__ inline void load_a(BlockA& a, const float* matrix, int row, int column) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int step = 0; step < 2; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* const pair = &matrix[(row + half * 8 + g) * kInverseStride + column + step * 8 + 2 * t];
      a[step][half] = pair[0];
      a[step][2 + half] = pair[1];
    }
  }
}

__device__ inline void load_b(BlockB& b, const float* matrix, int row, int column) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int step = 0; step < 2; ++step) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const float* const first = &matrix[(row + step * 8 + 2 * t) * kInverseStride + column + tile * 8 + g];
      b[step][tile][0] = first[0];
      b[step][tile][1] = first[kInverseStride];
    }
  }
}

// Two tiles c[16, 8].
__device__ inline void multiply_add_block(Accumulator (&c)[2], const BlockA& a, const BlockB& b) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) multiply_add_tf32(c[tile], a[step], b[step][tile][0], b[step][tile][1]);
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
    BlockA a;
    load_a(a, matrix, below + row, below + k);
#pragma unroll
    for (int n = 0; n < kSize; n += 16) {
      BlockB b;
      load_b(b, matrix, below + k, corner + n);
      multiply_add_block(left[n / 16], a, b);
    }
  }
#pragma unroll
  for (int k = 0; k < kSize; k += 16) {
    if (k < column) continue;  // and so is A^-1
    BlockA a;
    BlockB b;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const Accumulator& c = left[k / 16][step];
      a[step][0] = round_to_tf32(-c[0]);
      a[step][1] = round_to_tf32(-c[2]);
      a[step][2] = round_to_tf32(-c[1]);
      a[step][3] = round_to_tf32(-c[3]);
    }
    load_b(b, matrix, corner + k, corner + column);
    multiply_add_block(result, a, b);
  }
}

__device__ inline void store_result(float* matrix, int row, int column, const Accumulator (&c)[2]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float* const target = &matrix[(row + g) * kInverseStride + column + i * 8 + 2 * t];
    *reinterpret_cast<float2*>(target) = make_float2(round_to_tf32(c[i][0]), round_to_tf32(c[i][1]));
    *reinterpret_cast<float2*>(target + 8 * kInverseStride) =
        make_float2(round_to_tf32(c[i][2]), round_to_tf32(c[i][3]));
  }
}

// In place, by four warps; all of the block's call it, each four with a matrix of their own. The matrix must be visible
// to all; the result is after a barrier. Nothing above the diagonal is read; blocks of 16 above it are not written.
__device__ inline void invert(float* matrix) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  {  // each warp a block on the diagonal, each lane one of its columns
    float* const block = matrix + warp * 16 * (kInverseStride + 1);
    float column[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float sum = i == lane % 16 ? 1.0f : 0.0f;
#pragma unroll
      for (int j = 0; j < i; j += 4) {
        const float4 four = *reinterpret_cast<const float4*>(&block[i * kInverseStride + j]);
        const float entries[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          if (j + n < i) sum -= entries[n] * column[j + n];
        }
      }
      column[i] = sum;
    }
    __syncwarp();
    if (lane < 16) {
#pragma unroll
      for (int i = 0; i < 16; ++i) block[i * kInverseStride + lane] = round_to_tf32(column[i]);
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
