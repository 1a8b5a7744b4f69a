// Forward with the tokens innermost in memory: 16 bytes of one channel's tokens a thread.
#pragma once

#include "conv/cuda/tokens.cuh"

namespace inlay::conv::cuda {

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    tokens_forward_kernel(const __grid_constant__ Work<ForwardParams> work) {
  constexpr int kLanes = kPerAccess<T>;
  const ForwardParams& p = work.params;
  // Each thread has one tile of kLanes tokens; tiles of a row lie beside each other, then come the channels.
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t tiles = static_cast<uint32_t>(work.tiling.tiles);
  const uint32_t channels = static_cast<uint32_t>(p.channels);
  const uint32_t row = thread / tiles;
  const int64_t t = int64_t{thread - row * tiles} * kLanes;
  const int64_t batch = row / channels;
  const int64_t channel = row % channels;
  wait_for_predecessor();
  release_successor();
  if (batch >= p.batch) return;
  const ChannelWeights<kWidth> weights(p, channel);
  const Sequence sequence = p.sequences.find(batch, t);
  T* const y = static_cast<T*>(p.y.data) + p.y.offset(batch, t, channel);
  if (t + kLanes <= sequence.end) {
    float inputs[kWidth - 1 + kLanes], z[kLanes];
    load_inputs<T, kWidth - 1, kLanes>(p, sequence, batch, channel, t, inputs);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) z[i] = weights.preactivation(inputs + i);
    activate<T>(p.activation, p.rounds_preactivation, z);
    store_global(y, pack<T>(z));
  } else {  // tokens of several sequences
#pragma unroll 1
    for (int i = 0; i < kLanes; ++i) {
      float inputs[kWidth];
      load_taps<kWidth>(p, p.sequences.find(batch, t + i), batch, channel, t + i, inputs);
      float z[1] = {weights.preactivation(inputs)};
      activate<T>(p.activation, p.rounds_preactivation, z);
      y[i] = from_float<T>(z[0]);
    }
  }
}

template <typename T>
struct TokensForward {
  template <int kWidth>
  struct Make {
    static Plan<ForwardParams> plan(const ForwardParams& params) {
      constexpr int64_t kLanes = kPerAccess<T>;
      Plan<ForwardParams> plan;
      plan.tiling = tiling(params.batch, params.time, kLanes, params.batch * (params.time / kLanes));
      plan.blocks = ceil_div(plan.tiling.groups * params.channels, kThreads);
      plan.start = start_blocks<tokens_forward_kernel<T, kWidth>, ForwardParams>;
      return plan;
    }
  };
};

template <typename T>
Plan<ForwardParams> tokens_forward(const ForwardParams& params) {
  return plan_for_width<TokensForward<T>::template Make>(params);
}

}  // namespace inlay::conv::cuda
