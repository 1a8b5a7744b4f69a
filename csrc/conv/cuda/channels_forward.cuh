// Forward with the channels innermost in memory: 16 bytes of channels a thread, token by token. The loads of several
// tokens are issued before the first of them is used.
#pragma once

#include "conv/cuda/channels.cuh"

namespace inlay::conv::cuda {

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    channels_forward_kernel(const __grid_constant__ Work<ForwardParams> work) {
  constexpr int kLanes = kPerAccess<T>;
  const ForwardParams& p = work.params;
  const auto [group, channel] = owned_by_thread(p.channels, kLanes);
  wait_for_predecessor();
  release_successor();
  if (group >= work.tiling.groups) return;
  const ChannelWeights<kWidth, kLanes> weights(p, channel);
  const int64_t x_stride = p.x.time_stride;
  const int64_t y_stride = p.y.time_stride;

  for_runs(p, work.tiling, group,
           [&, channel = channel](const Sequence& sequence, int64_t batch, int64_t t, int64_t end) {
             Window<kWidth - 1, kLanes> window;
             load_window<T>(p, sequence, batch, channel, t, window);
             const T* x = static_cast<const T*>(p.x.data) + p.x.offset(batch, t, channel);
             T* y = static_cast<T*>(p.y.data) + p.y.offset(batch, t, channel);
             const auto convolve = [&](const Packed<T, kLanes>& packed, T* target) {
               float input[kLanes], z[kLanes];
               unpack(packed, input);
               preactivations(weights, window, input, z);
               activate<T>(p.activation, p.rounds_preactivation, z);
               store_global(target, pack<T>(z));
               window.push(input);
             };
             for (; t + kForwardStep <= end; t += kForwardStep) {
               Packed<T, kLanes> inputs[kForwardStep];
#pragma unroll
               for (int i = 0; i < kForwardStep; ++i) inputs[i] = load<T, kLanes>(x + i * x_stride);
#pragma unroll
               for (int i = 0; i < kForwardStep; ++i) convolve(inputs[i], y + i * y_stride);
               x += kForwardStep * x_stride;
               y += kForwardStep * y_stride;
             }
             for (; t < end; ++t, x += x_stride, y += y_stride) convolve(load<T, kLanes>(x), y);
           });
}

template <typename T>
struct ChannelsForward {
  template <int kWidth>
  struct Make {
    static Plan<ForwardParams> plan(const ForwardParams& params) {
      return make_plan<channels_forward_kernel<T, kWidth>>(params, params.channels / kPerAccess<T>, kMinTile,
                                                           kForwardWaves);
    }
  };
};

template <typename T>
Plan<ForwardParams> channels_forward(const ForwardParams& params) {
  return plan_for_width<ChannelsForward<T>::template Make>(params);
}

}  // namespace inlay::conv::cuda
