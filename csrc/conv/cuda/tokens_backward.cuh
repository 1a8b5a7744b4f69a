// Backward with the tokens innermost in memory; the maths is in channels_backward.cuh. A warp walks over a group of one
// channel's tokens, 16 bytes of them a thread and step. Each thread computes the gradients g of its tokens and of the
// width - 1 after them, and sums dweight and dbias of its own; the warp adds these up at the end.
#pragma once

#include "common/cuda/reduce.cuh"
#include "conv/cuda/tokens.cuh"

namespace inlay::conv::cuda {

// The gradients dy of tokens t to t + kLanes + kReach - 1, zeros behind the sequence; the first kLanes lie inside it.
template <typename T, int kReach, int kLanes>
__device__ inline void load_upstream(const BackwardParams& p, const Sequence& sequence, int64_t batch, int64_t channel,
                                     int64_t t, float (&upstream)[kLanes + kReach]) {
  const T* const dy = static_cast<const T*>(p.dy.data) + p.dy.offset(batch, t, channel);
  float part[kLanes];
  unpack(load<T, kLanes>(dy), part);
#pragma unroll
  for (int i = 0; i < kLanes; ++i) upstream[i] = part[i];
  if (t + kLanes + kReach <= sequence.end) {
    unpack(load<T, kLanes>(dy + kLanes), part);
#pragma unroll
    for (int i = 0; i < kReach; ++i) upstream[kLanes + i] = part[i];
  } else {
#pragma unroll
    for (int i = 0; i < kReach; ++i) {
      upstream[kLanes + i] = t + kLanes + i < sequence.end ? to_float(dy[kLanes + i]) : 0.0f;
    }
  }
}

// x of the kReach tokens after the thread's own, zeros behind the sequence.
template <typename T, int kReach, int kLanes, int N>
__device__ inline void load_inputs_after(const BackwardParams& p, const Sequence& sequence, int64_t batch,
                                         int64_t channel, int64_t t, float (&inputs)[N]) {
  const T* const x = static_cast<const T*>(p.x.data) + p.x.offset(batch, t, channel);
  if (t + kLanes + kReach <= sequence.end) {
    float part[kLanes];
    unpack(load<T, kLanes>(x + kLanes), part);
#pragma unroll
    for (int i = 0; i < kReach; ++i) inputs[kReach + kLanes + i] = part[i];
  } else {
#pragma unroll
    for (int i = 0; i < kReach; ++i) {
      inputs[kReach + kLanes + i] = t + kLanes + i < sequence.end ? to_float(x[kLanes + i]) : 0.0f;
    }
  }
}

// g of one token, and its taps' inputs.
template <typename T, int kWidth>
__device__ inline float gradient_at(const BackwardParams& p, const ChannelWeights<kWidth>& weights,
                                    const Sequence& sequence, int64_t batch, int64_t channel, int64_t t,
                                    float (&inputs)[kWidth]) {
  load_taps<kWidth>(p, sequence, batch, channel, t, inputs);
  const float upstream = load_one(p.dy.data, p.dtype, p.dy.offset(batch, t, channel));
  return through_activation<T>(p.activation, upstream, weights.preactivation(inputs));
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    tokens_backward_kernel(const __grid_constant__ Work<BackwardParams> work) {
  constexpr int kLanes = kPerAccess<T>;
  constexpr int kReach = kWidth - 1;
  const BackwardParams& p = work.params;
  const int lane = threadIdx.x % kWarp;
  const uint32_t warp = (blockIdx.x * kThreads + threadIdx.x) / kWarp;
  const int64_t group = warp / static_cast<uint32_t>(p.channels);
  const int64_t channel = warp % static_cast<uint32_t>(p.channels);
  wait_for_predecessor();
  release_successor();
  if (group >= work.tiling.groups) return;
  const ChannelWeights<kWidth> weights(p, channel);
  float sums[kWidth + 1] = {};  // dweight, dbias
  const auto add_to_sums = [&](float g, const float* inputs) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sums[k] = __fmaf_rn(g, inputs[k], sums[k]);
    sums[kWidth] += g;
  };

  // dx of kLanes tokens that lie in one sequence.
  const auto whole = [&](const Sequence& sequence, int64_t batch, int64_t t, float (&dx)[kLanes]) {
    float inputs[kReach + kLanes + kReach], g[kLanes + kReach];
    load_inputs<T, kReach, kLanes>(p, sequence, batch, channel, t, inputs);
    load_inputs_after<T, kReach, kLanes>(p, sequence, batch, channel, t, inputs);
    load_upstream<T, kReach, kLanes>(p, sequence, batch, channel, t, g);
#pragma unroll
    for (int i = 0; i < kLanes + kReach; ++i) {
      const float gradient = through_activation<T>(p.activation, g[i], weights.preactivation(inputs + i));
      g[i] = t + i < sequence.end ? gradient : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      add_to_sums(g[i], inputs + i);
      dx[i] =
          input_gradient<kWidth>([&](int k) { return weights.weight[k]; }, [&](int k) { return g[i + kReach - k]; });
    }
    if (t + kLanes > sequence.end - kReach) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) dx[i] += final_state_gradient(p, sequence, channel, t + i);
    }
  };
  // dx of a token beside another sequence.
  const auto single = [&](const Sequence& sequence, int64_t batch, int64_t t) {
    float g[kWidth];
#pragma unroll
    for (int i = kReach; i >= 0; --i) {  // the token's own last
      float inputs[kWidth];
      g[i] = t + i < sequence.end ? gradient_at<T>(p, weights, sequence, batch, channel, t + i, inputs) : 0.0f;
      if (i == 0) add_to_sums(g[0], inputs);
    }
    return input_gradient<kWidth>([&](int k) { return weights.weight[k]; }, [&](int k) { return g[kReach - k]; }) +
           final_state_gradient(p, sequence, channel, t);
  };

  const int64_t first_tile = group * work.tiling.tiles_per_group;
  for (int64_t i = 0; i < work.tiling.tiles_per_group && first_tile + i < work.tiling.all_tiles; ++i) {
    const int64_t batch = static_cast<uint32_t>(first_tile + i) / static_cast<uint32_t>(work.tiling.tiles);
    const int64_t first = (first_tile + i - batch * work.tiling.tiles) * work.tiling.tile;
    const int64_t last = first + work.tiling.tile < p.time ? first + work.tiling.tile : p.time;
    for (int64_t t = first + lane * kLanes; t < last; t += kWarp * kLanes) {
      const Sequence sequence = p.sequences.find(batch, t);
      T* const target = static_cast<T*>(p.dx.data) + p.dx.offset(batch, t, channel);
      if (t + kLanes <= sequence.end) {
        float dx[kLanes];
        whole(sequence, batch, t, dx);
        store_global(target, pack<T>(dx));
      } else {
#pragma unroll 1
        for (int j = 0; j < kLanes; ++j) {
          target[j] = from_float<T>(single(p.sequences.find(batch, t + j), batch, t + j));
        }
      }
    }
  }

  if (!p.partials) return;
  __shared__ typename GroupSum<kWarp, kThreads, kWidth + 1>::Scratch scratch;
  GroupSum<kWarp, kThreads, kWidth + 1>{scratch}(sums);
  if (lane != 0) return;
  float* target = static_cast<float*>(p.partials) + group * p.sums() * p.channels + channel;
  if (p.dweight.data) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k, target += p.channels) *target = sums[k];
  }
  if (p.dbias.data) *target = sums[kWidth];
}

template <typename T>
struct TokensBackward {
  template <int kWidth>
  struct Make {
    static Plan<BackwardParams> plan(const BackwardParams& params) {
      return make_plan<tokens_backward_kernel<T, kWidth>>(params, params.channels * kWarp, kWarp * kPerAccess<T>,
                                                          kBackwardWaves);
    }
  };
};

template <typename T>
Plan<BackwardParams> tokens_backward(const BackwardParams& params) {
  return plan_for_width<TokensBackward<T>::template Make>(params);
}

}  // namespace inlay::conv::cuda
