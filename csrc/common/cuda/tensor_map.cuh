// Hopper's copy engine for tensors: boxes of a tensor, cut out by coordinates, go to shared memory in the order that
// the tensor cores read. What lies outside of the tensor comes as zeros, and the number of bytes stays the same.
#pragma once

#include "common/cuda/bulk.cuh"
#include "common/cuda/tensor_map.h"

namespace inlay::cuda {

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
