// Products of float32 values to float32's precision, of three on the tensor cores.
#pragma once

#include "common/cuda/mma.cuh"

namespace inlay::cuda {

// A float32 value as the sum of two that products do not round: x = high + low but for its last bit at most.
struct Split {
  float high, low;

  __device__ __forceinline__ explicit Split(float x) {
    high = round_to_tf32(x);
    low = high == x ? 0.0f : x - high;  // infinity stays what it is
  }
};

// An `a` of float32 values, split.
struct SplitFragment {
  float high[4], low[4];

  __device__ __forceinline__ void set(float a0, float a1, float a2, float a3) {
    const float a[4] = {a0, a1, a2, a3};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Split split(a[i]);
      high[i] = split.high;
      low[i] = split.low;
    }
  }
};

// large + small += a b. Tensor cores drop what lies below a sum's last bit: small terms have a sum of their own, and
// both are short. With `tf32` one product does.
__device__ __forceinline__ void multiply_add_split(Accumulator& large, Accumulator& small, const SplitFragment& a,
                                                   float b0, float b1, bool tf32 = false) {
  const Split first(b0), second(b1);
  if (!tf32) {
    multiply_add_tf32(small, a.low, first.high, second.high);
    multiply_add_tf32(small, a.high, first.low, second.low);
  }
  multiply_add_tf32(large, a.high, first.high, second.high);
}

}  // namespace inlay::cuda
