// Hopper's copy engine for tensors: boxes of a tensor, cut out by coordinates, go to shared memory in the order that
// the tensor cores read. What lies outside of the tensor comes as zeros, and the number of bytes stays the same.
#pragma once

#include <cuda.h>

#include "common/cuda/bulk.cuh"
#include "common/cuda/launch.cuh"
#include "common/sequences.h"

namespace inlay::cuda {

// What a tensor map is made of: [batch, tokens, heads, columns] of 16-bit values in boxes of `rows` tokens of one head
// by 64 columns, permuted as Tile does.
struct BoxedTensor {
  TokenTensor tensor;
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t heads = 0;
  int64_t columns = 0;
  int rows = 0;
};

// Whether the engine can read the tensor: it starts, and its rows start, at multiples of 16 bytes, and it is not
// expanded.
inline bool fits_tensor_map(const BoxedTensor& of) {
  const auto fits = [](int64_t size, int64_t stride) {
    return size <= 1 || (stride > 0 && stride % 8 == 0 && stride < (int64_t{1} << 39) && size < (int64_t{1} << 31));
  };
  const TokenTensor& x = of.tensor;
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && fits(of.batch, x.batch_stride) &&
         fits(of.tokens, x.token_stride) && fits(of.heads, x.head_stride);
}

// The driver's function is looked up, so that the library does not need to be linked with the driver's.
inline CUtensorMap make_tensor_map(const BoxedTensor& of) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "looking up cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("inlay: the driver has no tensor maps");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  const TokenTensor& x = of.tensor;
  // The engine wants no empty dimension, and a proper stride where it says nothing.
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n > 0 ? n : 1); };
  const auto bytes = [](int64_t n, int64_t stride) { return static_cast<cuuint64_t>(n > 1 ? stride * 2 : 16); };
  const cuuint64_t sizes[] = {size(of.columns), size(of.tokens), size(of.heads), size(of.batch)};
  const cuuint64_t strides[] = {bytes(of.tokens, x.token_stride), bytes(of.heads, x.head_stride),
                                bytes(of.batch, x.batch_stride)};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(of.rows), 1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, x.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
             const_cast<void*>(x.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("inlay: cuTensorMapEncodeTiled failed with error " + std::to_string(result));
  }
  return map;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

inline constexpr bool kHasTensorMaps = true;

// Fetches a box, as start_bulk_fetch() does its bytes: by one thread.
__device__ __forceinline__ void fetch_box(uint32_t shared, const CUtensorMap& map, int column, int token, int head,
                                          int batch, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared),
      "l"(&map), "r"(column), "r"(token), "r"(head), "r"(batch), "r"(shared_address(&barrier))
      : "memory");
}

// Stores what of a box lies within the tensor, as start_bulk_store() does: by one thread.
__device__ __forceinline__ void store_box(const CUtensorMap& map, int column, int token, int head, int batch,
                                          uint32_t shared) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
               "r"(column), "r"(token), "r"(head), "r"(batch), "r"(shared)
               : "memory");
}

#else

// Never called there: kernels ask first.
inline constexpr bool kHasTensorMaps = false;

__device__ inline void fetch_box(uint32_t, const CUtensorMap&, int, int, int, int, Barrier&) {}
__device__ inline void store_box(const CUtensorMap&, int, int, int, int, uint32_t) {}

#endif

}  // namespace inlay::cuda
