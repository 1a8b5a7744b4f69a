// Products of 16x16 by 16x8 on the tensor cores, and loads of their operands from shared memory; sm_80 and later.
//
// Lane 4 g + t holds, of the operands of c[16, 8] += a[16, 16] b[16, 8]:
//   c: rows g, g + 8 x columns 2t, 2t + 1       c[0] c[1] (row g), c[2] c[3] (row g + 8)
//   a: the same of columns 0-7 (a[0] row g, a[1] row g + 8) and of columns 8-15 (a[2], a[3]), two values a register
//   b: column g x rows 2t, 2t + 1 (b0) and 2t + 8, 2t + 9 (b1)
// So two neighbouring c of one product, rounded, are an a of the next, with no exchange between lanes.
#pragma once

#include <cstdint>

#include "common/cuda/vector.cuh"

namespace inlay::cuda {

using Fragment = uint32_t[4];  // an a, or the b of two neighbouring column tiles
using Accumulator = float[4];  // a c

template <typename T>
__device__ inline uint32_t pack_pair(float low, float high) {
  const float values[2] = {low, high};
  const Packed<T, 2> packed = pack<T>(values);
  return *reinterpret_cast<const uint32_t*>(&packed);
}

template <typename T>
__device__ inline void unpack_pair(uint32_t word, float& low, float& high) {
  const T* const values = reinterpret_cast<const T*>(&word);
  low = to_float(values[0]);
  high = to_float(values[1]);
}

template <typename T>
__device__ inline void multiply_add(Accumulator& c, const Fragment& a, uint32_t b0, uint32_t b1) {
  if constexpr (kDType<T> == DType::bf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// c[16, 8] += a[16, 8] b[8, 8] of float32 values, whose last 13 bits are dropped. Lane 4 g + t holds a of rows g (a[0],
// a[2]) and g + 8 (a[1], a[3]), b of column g, each of the summed dimension's values t and t + 4: or any other two, as
// long as they are the same ones for a and b.
__device__ inline void multiply_add_tf32(Accumulator& c, const float (&a)[4], float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// To the next value with no more digits than a product looks at.
__device__ inline float round_to_tf32(float x) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return __uint_as_float(rounded);
}

// 2^x in one instruction, to 2 units in the last place; results below float32's normal numbers are zero.
__device__ inline float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The same for tanh, to 2^-11 of the result.
__device__ inline float tanh_fast(float x) {
  float result;
  asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Four 8x8 matrices; lane 8 i + j names row j of matrix i, 16 bytes. Of matrix i, r[i] holds row g, columns 2t, 2t + 1;
// transposed: column g, rows 2t, 2t + 1.
template <bool kTransposed>
__device__ inline void load_matrices(Fragment& r, uint32_t row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
  }
}

// An 8x8 matrix across the warp: row g, columns 2t, 2t + 1 becomes column g, rows 2t, 2t + 1.
__device__ inline uint32_t transpose_matrix(uint32_t word) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(word));
  return transposed;
}

// The opposite of load_matrices.
template <bool kTransposed>
__device__ inline void store_matrices(uint32_t row, const Fragment& r) {
#if __CUDA_ARCH__ >= 900
  if constexpr (kTransposed) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
  }
#else
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t own = __shfl_sync(0xffffffffu, row, i * 8 + lane / 4);
    const uint32_t word = kTransposed ? transpose_matrix(r[i]) : r[i];
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(own + lane % 4 * 4), "r"(word) : "memory");
  }
#endif
}

// The shared memory that the kernel is started with.
__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline void store_shared(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

__device__ inline void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ inline uint4 load_shared(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ inline uint32_t load_shared_word(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

// 16 bytes at once, which the compiler may split where they come from a selection.
__device__ inline void store_global(void* address, uint4 value) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// Copies 16 bytes in the background.
__device__ inline void copy_async(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// The same of the first `bytes`; zeros after them.
__device__ inline void copy_async_partial(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

// The same, or zeros.
__device__ inline void copy_async_or_zero(uint32_t shared, const void* global, bool wanted) {
  copy_async_partial(shared, global, wanted ? 16 : 0);
}

// The same for 8 bytes.
__device__ inline void copy_pair_async_or_zero(uint32_t shared, const void* global, bool wanted) {
  const int bytes = wanted ? 8 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

}  // namespace inlay::cuda
