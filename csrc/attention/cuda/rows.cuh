// What a thread of a warpgroup has of a product's 64 rows (see mma.cuh: two rows, and of each 8 columns two), rounded
// to 16 bits: as the next product's operand, and to and from global memory in pieces of 16 bytes.
#pragma once

#include "common/cuda/mma.cuh"

namespace inlay::attention::cuda {

using namespace inlay::cuda;

template <typename T, int kSteps, int kTiles>
__device__ __forceinline__ void pack_steps(Fragment (&p)[kSteps], const Accumulator (&s)[kTiles]) {
  static_assert(kTiles == 2 * kSteps);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    p[i / 2][i % 2 * 2] = pack_pair<T>(s[i][0], s[i][1]);
    p[i / 2][i % 2 * 2 + 1] = pack_pair<T>(s[i][2], s[i][3]);
  }
}

// Four threads with a word of each of four tiles: afterwards each has the words of one tile, or the other way round.
__device__ __forceinline__ void exchange_words(uint32_t (&w)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  const uint32_t x = __shfl_xor_sync(0xffffffffu, odd ? w[0] : w[1], 1);
  const uint32_t y = __shfl_xor_sync(0xffffffffu, odd ? w[2] : w[3], 1);
  (odd ? w[0] : w[1]) = x;
  (odd ? w[2] : w[3]) = y;
  const uint32_t z = __shfl_xor_sync(0xffffffffu, high ? w[0] : w[2], 2);
  const uint32_t u = __shfl_xor_sync(0xffffffffu, high ? w[1] : w[3], 2);
  (high ? w[0] : w[2]) = z;
  (high ? w[1] : w[3]) = u;
}

// 16 bytes to global memory where `wanted`, without a branch.
__device__ __forceinline__ void store_piece(void* to, const uint32_t (&words)[4], bool wanted) {
  asm volatile(
      "{ .reg .pred wanted; setp.ne.b32 wanted, %5, 0; @wanted st.global.v4.b32 [%0], {%1,%2,%3,%4}; }" ::"l"(to),
      "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(static_cast<int>(wanted))
      : "memory");
}

// 16 bytes of global memory where `wanted`, else zeros; without a branch, so that many loads are under way at once.
__device__ __forceinline__ void load_piece(uint32_t (&words)[4], const void* from, bool wanted) {
  asm volatile(
      "{ .reg .pred wanted; setp.ne.b32 wanted, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0; "
      "@wanted ld.global.v4.b32 {%0,%1,%2,%3}, [%4]; }"
      : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
      : "l"(from), "r"(static_cast<int>(wanted))
      : "memory");
}

// The first `columns` of two rows times their multipliers, where they are `there`. Rows start at multiples of 16 bytes.
template <typename T, int kTiles>
__device__ __forceinline__ void store_rows(T* const (&rows)[2], const bool (&there)[2], int columns,
                                           const Accumulator (&values)[kTiles], const float (&multiplier)[2]) {
  const int part = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    T* const to = rows[r] + part * 8;
#pragma unroll
    for (int tile = 0; tile < kTiles; tile += 4) {
      uint32_t words[4] = {};
#pragma unroll
      for (int i = 0; i < 4 && tile + i < kTiles; ++i) {
        words[i] = pack_pair<T>(values[tile + i][2 * r] * multiplier[r], values[tile + i][2 * r + 1] * multiplier[r]);
      }
      exchange_words(words);
      store_piece(to + tile * 8, words, there[r] && (tile + part) * 8 < columns);
    }
  }
}

}  // namespace inlay::attention::cuda
