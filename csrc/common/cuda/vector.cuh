// Values of 16 bytes or one element: loads, stores and conversion to the float32 that all arithmetic is done in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"

namespace inlay::cuda {

template <typename T>
constexpr int kPerAccess = 16 / sizeof(T);  // elements in the widest access

// N elements as they lie in memory, held in registers.
template <typename T, int N>
struct alignas(sizeof(T) * N) Packed {
  T values[N];
};

template <typename T>
constexpr DType kDType = DType::f32;
template <>
inline constexpr DType kDType<__nv_bfloat16> = DType::bf16;
template <>
inline constexpr DType kDType<__half> = DType::f16;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// Plain loads on purpose: the compiler moves __ldg in front of the branch that guards it, and null pointers are read.
template <typename T, int N>
__device__ inline Packed<T, N> load(const T* source) {
  Packed<T, N> packed;
  if constexpr (sizeof(packed) % 16 == 0) {  // 32 bytes where float32 stands beside 16-bit tensors
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(packed) / 16); ++i) {
      reinterpret_cast<uint4*>(&packed)[i] = reinterpret_cast<const uint4*>(source)[i];
    }
  } else if constexpr (sizeof(packed) == 8) {
    *reinterpret_cast<uint64_t*>(&packed) = *reinterpret_cast<const uint64_t*>(source);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) packed.values[i] = source[i];
  }
  return packed;
}

template <typename T, int N>
__device__ inline void store(T* target, const Packed<T, N>& packed) {
  if constexpr (sizeof(packed) >= 16) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(packed) / 16); ++i) {
      reinterpret_cast<uint4*>(target)[i] = reinterpret_cast<const uint4*>(&packed)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) target[i] = packed.values[i];
  }
}

// 8 or 16 bytes to global memory in one instruction. An assignment, as in store(), is split where the compiler loses
// sight of the alignment.
template <typename T, int N>
__device__ inline void store_global(T* target, const Packed<T, N>& packed) {
  if constexpr (sizeof(packed) == 16) {
    __stwb(reinterpret_cast<uint4*>(target), *reinterpret_cast<const uint4*>(&packed));
  } else {
    static_assert(sizeof(packed) == 8);
    __stwb(reinterpret_cast<uint2*>(target), *reinterpret_cast<const uint2*>(&packed));
  }
}

template <typename T, int N>
__device__ inline void unpack(const Packed<T, N>& packed, float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = to_float(packed.values[i]);
}

template <typename T, int N>
__device__ inline Packed<T, N> pack(const float (&values)[N]) {
  Packed<T, N> packed;
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {  // single conversions to 16 bits run at an eighth of the pairs' rate
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      if constexpr (kDType<T> == DType::bf16) {
        reinterpret_cast<__nv_bfloat162*>(&packed)[i / 2] = __floats2bfloat162_rn(values[i], values[i + 1]);
      } else {
        reinterpret_cast<__half2*>(&packed)[i / 2] = __floats2half2_rn(values[i], values[i + 1]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) packed.values[i] = from_float<T>(values[i]);
  }
  return packed;
}

// The products of 16-bit values, rounded once: the same bits as a float32 product that is then rounded.
template <typename T, int N>
__device__ inline Packed<T, N> multiply(const Packed<T, N>& a, const Packed<T, N>& b) {
  static_assert(sizeof(T) == 2 && N % 2 == 0);
  using Pair = std::conditional_t<kDType<T> == DType::bf16, __nv_bfloat162, __half2>;
  Packed<T, N> product;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    reinterpret_cast<Pair*>(&product)[i] =
        __hmul2_rn(reinterpret_cast<const Pair*>(&a)[i], reinterpret_cast<const Pair*>(&b)[i]);
  }
  return product;
}

// The sums of 16-bit values, rounded once.
template <typename T, int N>
__device__ inline Packed<T, N> add(const Packed<T, N>& a, const Packed<T, N>& b) {
  static_assert(sizeof(T) == 2 && N % 2 == 0);
  using Pair = std::conditional_t<kDType<T> == DType::bf16, __nv_bfloat162, __half2>;
  Packed<T, N> sum;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    reinterpret_cast<Pair*>(&sum)[i] =
        __hadd2_rn(reinterpret_cast<const Pair*>(&a)[i], reinterpret_cast<const Pair*>(&b)[i]);
  }
  return sum;
}

// Makes the compiler convert `packed` anew for its next use, instead of keeping the wider floats in registers.
template <typename T, int N>
__device__ inline void keep_packed(Packed<T, N>& packed) {
  if constexpr (sizeof(packed) == 16 && sizeof(T) < sizeof(float)) {
    uint4& words = *reinterpret_cast<uint4*>(&packed);
    asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
  }
}

template <typename T, int N>
__device__ inline void round_all(float (&values)[N]) {
  if constexpr (sizeof(T) < sizeof(float)) unpack(pack<T>(values), values);
}

// The same for a dtype known only at run time; the branch is uniform.
template <int N>
__device__ inline void load_as_float(const void* data, DType dtype, int64_t index, float (&values)[N]) {
  if (dtype == DType::f32) {
    unpack(load<float, N>(static_cast<const float*>(data) + index), values);
  } else if (dtype == DType::bf16) {
    unpack(load<__nv_bfloat16, N>(static_cast<const __nv_bfloat16*>(data) + index), values);
  } else {
    unpack(load<__half, N>(static_cast<const __half*>(data) + index), values);
  }
}

template <int N>
__device__ inline void store_from_float(void* data, DType dtype, int64_t index, const float (&values)[N]) {
  if (dtype == DType::f32) {
    store(static_cast<float*>(data) + index, pack<float>(values));
  } else if (dtype == DType::bf16) {
    store(static_cast<__nv_bfloat16*>(data) + index, pack<__nv_bfloat16>(values));
  } else {
    store(static_cast<__half*>(data) + index, pack<__half>(values));
  }
}

}  // namespace inlay::cuda
