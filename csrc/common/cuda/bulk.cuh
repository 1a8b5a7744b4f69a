// Copies of whole tiles that lie in memory as they do in shared memory: on Hopper one thread starts one, which costs
// the others nothing; elsewhere all threads of the group that fetches take part, as for other copies.
#pragma once

#include "common/cuda/mma.cuh"

namespace inlay::cuda {

// Opens when the copies that were announced to it have come, once for each phase. In shared memory.
struct BulkBarrier {
  uint64_t state;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// By one thread, before a __syncthreads().
__device__ __forceinline__ void init_barrier(BulkBarrier& barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// By one thread, once a phase, before its copies.
__device__ __forceinline__ void expect_bytes(BulkBarrier& barrier, int bytes, unsigned thread) {
  if (thread != 0) return;
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

// Both addresses and `bytes` are multiples of 16.
template <int kThreads>
__device__ __forceinline__ void fetch_bytes(uint32_t shared, const void* global, int bytes, BulkBarrier& barrier,
                                            unsigned thread) {
  if (thread != 0) return;
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}

// Until the copies of phase 0, 1, 2 ... have come; visible to products too.
__device__ __forceinline__ void wait_for_bytes(BulkBarrier& barrier, int64_t phase) {
  const uint32_t address = shared_address(&barrier), parity = static_cast<uint32_t>(phase) & 1;
  asm volatile(
      "{ .reg .pred done; WAIT_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @done bra DONE_%=; bra "
      "WAIT_%=; DONE_%=: }" ::"r"(address),
      "r"(parity)
      : "memory");
}

#else

__device__ inline void init_barrier(BulkBarrier&) {}
__device__ inline void expect_bytes(BulkBarrier&, int, unsigned) {}
template <int kThreads>
__device__ inline void fetch_bytes(uint32_t shared, const void* global, int bytes, BulkBarrier&, unsigned thread) {
  for (int i = static_cast<int>(thread) * 16; i < bytes; i += kThreads * 16) {
    copy_async(shared + i, static_cast<const char*>(global) + i);
  }
}
__device__ inline void wait_for_bytes(BulkBarrier&, int64_t) {}

#endif

// The opposite, by all threads at once.
template <int kThreads>
__device__ __forceinline__ void store_bytes(void* global, uint32_t shared, int bytes, unsigned thread) {
  for (int i = static_cast<int>(thread) * 16; i < bytes; i += kThreads * 16) {
    *reinterpret_cast<uint4*>(static_cast<char*>(global) + i) = load_shared(shared + i);
  }
}

}  // namespace inlay::cuda
