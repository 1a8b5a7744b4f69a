// Copies of whole tiles that lie in memory as they do in shared memory: on Hopper one thread starts one, which costs
// the others nothing (but lanes that start one each do so one after another); elsewhere all threads of the group take
// part, as for other copies.
#pragma once

#include "common/cuda/barrier.cuh"
#include "common/cuda/pipeline.cuh"

namespace inlay::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// What one phase of a barrier waits for if `kThreads` threads fetch: expect_bytes() and arrive_fetched().
template <int kThreads>
inline constexpr int kFetchArrivals = 1 + kThreads / 32;

// By one thread, once a phase: an arrival, and so many bytes to wait for. Copies may have begun.
__device__ __forceinline__ void expect_bytes(Barrier& barrier, int bytes, unsigned thread) {
  if (thread != 0) return;
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

// By all threads that fetch, after all was started. `copies`: there were other ones, or stores, as well.
__device__ __forceinline__ void arrive_fetched(Barrier& barrier, bool copies) {
  if (copies) {
    commit_copies();
    wait_for_copies<0>();
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the next fetch to their place may be in bulk
  }
  arrive_as_warp(barrier);
}

// By one thread. Both addresses and `bytes` are multiples of 16.
__device__ __forceinline__ void start_bulk_fetch(uint32_t shared, const void* global, int bytes, Barrier& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}

__device__ __forceinline__ void start_bulk_store(void* global, uint32_t shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared), "r"(bytes)
               : "memory");
}

// Adds float32 values in shared memory to those in global memory, whoever else does so.
__device__ __forceinline__ void start_bulk_add(float* global, uint32_t shared, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global), "r"(shared),
               "r"(bytes)
               : "memory");
}

// Brings bytes, a multiple of 16, to the L2 cache.
__device__ __forceinline__ void prefetch_bytes_to_l2(const void* global, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}

template <int kThreads>
__device__ __forceinline__ void fetch_bytes(uint32_t shared, const void* global, int bytes, Barrier& barrier,
                                            unsigned thread) {
  if (thread == 0) start_bulk_fetch(shared, global, bytes, barrier);
}

// Shared memory to global. What was written to shared memory must be published, and a barrier passed. Until
// wait_for_stores() of the same threads, nothing there may change.
template <int kThreads>
__device__ __forceinline__ void store_bytes_bulk(void* global, uint32_t shared, int bytes, unsigned thread) {
  if (thread == 0) start_bulk_store(global, shared, bytes);
}

__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Until they are in global memory as well.
__device__ __forceinline__ void wait_until_stored() {
  asm volatile("cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;" ::: "memory");
}

#else

template <int kThreads>
inline constexpr int kFetchArrivals = kThreads;

__device__ inline void expect_bytes(Barrier&, int, unsigned) {}
__device__ inline void arrive_fetched(Barrier& barrier, bool) {
  __threadfence_block();  // some may have been no copies
  arrive_after_copies(barrier);
}

template <int kThreads>
__device__ inline void fetch_bytes(uint32_t shared, const void* global, int bytes, Barrier&, unsigned thread) {
  for (int i = static_cast<int>(thread) * 16; i < bytes; i += kThreads * 16) {
    copy_async(shared + i, static_cast<const char*>(global) + i);
  }
}

template <int kThreads>
__device__ inline void store_bytes_bulk(void* global, uint32_t shared, int bytes, unsigned thread) {
  for (int i = static_cast<int>(thread) * 16; i < bytes; i += kThreads * 16) {
    *reinterpret_cast<uint4*>(static_cast<char*>(global) + i) = load_shared(shared + i);
  }
}

__device__ inline void wait_for_stores() {}

#endif

}  // namespace inlay::cuda
