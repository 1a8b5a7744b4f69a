// Sums over the threads that share a row, in an order that never changes.
#pragma once

namespace inlay::cuda {

// The sums of up to `Count` values over each group of kGroup consecutive threads, given to every thread of the group.
// A group is a part of a warp, a warp, or several warps with a barrier of their own. The scratch of the last kind
// alternates between two halves, so that one barrier a call is enough.
template <int kGroup, int kThreads, int Count>
class GroupSum {
 public:
  static constexpr int kWarps = kGroup > 32 ? kGroup / 32 : 1;
  static constexpr int kGroups = kThreads / kGroup;
  static_assert(kThreads % kGroup == 0 && (kGroup > 32 ? kGroup % 32 == 0 : 32 % kGroup == 0));

  struct Scratch {
    float partial[kGroups][2][kWarps][Count];
  };

  __device__ explicit GroupSum(Scratch& scratch) : scratch_(scratch) {}

  template <int N>
  __device__ void operator()(float (&values)[N]) {
    static_assert(N <= Count);
    constexpr int kLanes = kGroup > 32 ? 32 : kGroup;
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] += __shfl_xor_sync(0xffffffffu, values[i], offset);
    }
    if constexpr (kWarps > 1) {
      const int group = threadIdx.x / kGroup;
      auto& partial = scratch_.partial[group][phase_];
      phase_ ^= 1;
      if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int i = 0; i < N; ++i) partial[threadIdx.x % kGroup / 32][i] = values[i];
      }
      if constexpr (kGroups == 1) {
        __syncthreads();
      } else {  // barrier 0 is __syncthreads'
        asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kGroup) : "memory");
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        values[i] = 0.0f;
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) values[i] += partial[warp][i];
      }
    }
  }

 private:
  Scratch& scratch_;
  int phase_ = 0;
};

}  // namespace inlay::cuda
