// What the kernels with the tokens innermost share: a thread works on 16 bytes of neighbouring tokens of one channel.
// Those before and after them, which the taps reach, come from the same cache lines as its neighbours' tokens.
#pragma once

#include "common/cuda/launch.cuh"
#include "conv/cuda/config.h"
#include "conv/cuda/launch.h"
#include "conv/cuda/maths.cuh"

namespace inlay::conv::cuda {

// Weights and bias of one channel.
template <int kWidth>
struct ChannelWeights {
  float weight[kWidth];
  float bias = 0.0f;

  __device__ ChannelWeights(const Convolution& p, int64_t channel) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) weight[k] = load_one(p.weight.data, p.weight.dtype, channel * kWidth + k);
    if (p.bias.data) bias = load_one(p.bias.data, p.bias.dtype, channel);
  }

  // With the inputs under the taps, oldest first.
  __device__ float preactivation(const float* inputs) const {
    return cuda::preactivation<kWidth>([&](int k) { return weight[k]; }, [&](int k) { return inputs[k]; }, bias);
  }
};

// inputs[i] is the input at position t - kReach + i: the thread's tokens, which lie in one sequence, and those before.
template <typename T, int kReach, int kLanes, int N>
__device__ inline void load_inputs(const Convolution& p, const Sequence& sequence, int64_t batch, int64_t channel,
                                   int64_t t, float (&inputs)[N]) {
  static_assert(kReach <= kLanes && N >= kReach + kLanes);
  const T* const x = static_cast<const T*>(p.x.data) + p.x.offset(batch, t, channel);
  float own[kLanes];
  unpack(load<T, kLanes>(x), own);
#pragma unroll
  for (int i = 0; i < kLanes; ++i) inputs[kReach + i] = own[i];
  if (t - kReach >= sequence.begin) {
    float before[kLanes];
    unpack(load<T, kLanes>(x - kLanes), before);
#pragma unroll
    for (int i = 0; i < kReach; ++i) inputs[i] = before[kLanes - kReach + i];
  } else {
#pragma unroll
    for (int i = 0; i < kReach; ++i) inputs[i] = input_at(p, sequence, batch, channel, t - kReach + i);
  }
}

// The inputs under the taps of one token.
template <int kWidth>
__device__ inline void load_taps(const Convolution& p, const Sequence& sequence, int64_t batch, int64_t channel,
                                 int64_t t, float (&inputs)[kWidth]) {
#pragma unroll
  for (int k = 0; k < kWidth; ++k) inputs[k] = input_at(p, sequence, batch, channel, t - (kWidth - 1) + k);
}

}  // namespace inlay::conv::cuda
