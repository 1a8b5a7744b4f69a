// Backward with the channels innermost in memory. With g[t] the gradient of token t's preactivation,
//   dx[t] = sum over k of weight[k] * g[t + width - 1 - k],   dweight[k] = sum over t of g[t] * x[t - (width - 1) + k]
// so that a thread that walks through time knows dx of a token width - 1 tokens later. It computes the preactivation
// anew, keeps the last g beside the last inputs, and sums dweight and dbias of its group of tokens in registers: one
// row of `partials` a group, which sum_partials adds in order.
#pragma once

#include "conv/cuda/channels.cuh"

namespace inlay::conv::cuda {

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBackwardMinBlocks<T>)
    channels_backward_kernel(const __grid_constant__ Work<BackwardParams> work) {
  constexpr int kLanes = kBackwardLanes;
  constexpr int kReach = kWidth - 1;
  using Vector = Packed<T, kLanes>;
  const BackwardParams& p = work.params;
  const auto [group, channel] = owned_by_thread(p.channels, kLanes);
  wait_for_predecessor();
  release_successor();
  if (group >= work.tiling.groups) return;
  const ChannelWeights<kWidth, kLanes> weights(p, channel);
  float dweight[kWidth][kLanes] = {};
  float dbias[kLanes] = {};

  for_runs(p, work.tiling, group,
           [&, channel = channel](const Sequence& sequence, int64_t batch, int64_t begin, int64_t end) {
             Window<kReach, kLanes> inputs;  // of the tokens before t
             Window<kReach, kLanes> gradients;
             load_window<T>(p, sequence, batch, channel, begin, inputs);
             gradients.clear();
             const T* const x = static_cast<const T*>(p.x.data) + p.x.offset(batch, 0, channel);
             const T* const dy = static_cast<const T*>(p.dy.data) + p.dy.offset(batch, 0, channel);
             T* const dx = static_cast<T*>(p.dx.data) + p.dx.offset(batch, 0, channel);

             // g of a token, which adds to the sums if it is one of the run's own.
             const auto gradient = [&](const Vector& packed_x, const Vector& packed_dy, bool adds, float (&g)[kLanes]) {
               float input[kLanes], z[kLanes];
               unpack(packed_x, input);
               unpack(packed_dy, g);
               preactivations(weights, inputs, input, z);
#pragma unroll
               for (int lane = 0; lane < kLanes; ++lane) {
                 g[lane] = through_activation<T>(p.activation, g[lane], z[lane]);
                 if (adds) {
#pragma unroll
                   for (int k = 0; k < kReach; ++k)
                     dweight[k][lane] = __fmaf_rn(g[lane], inputs.values[k][lane], dweight[k][lane]);
                   dweight[kReach][lane] = __fmaf_rn(g[lane], input[lane], dweight[kReach][lane]);
                   dbias[lane] += g[lane];
                 }
               }
               inputs.push(input);
             };
             // dx of the token kReach before the one whose g is given.
             const auto input_gradients = [&](const float (&g)[kLanes], float (&result)[kLanes]) {
#pragma unroll
               for (int lane = 0; lane < kLanes; ++lane) {
                 result[lane] = input_gradient<kWidth>(
                     [&](int k) { return weights.weight[k][lane]; },
                     [&](int k) { return k == 0 ? g[lane] : gradients.values[kReach - k][lane]; });
               }
               gradients.push(g);
             };

             for (int64_t t = begin; t < end + kReach;) {
               if (t >= begin + kReach && t + kBackwardStep <= end) {
                 Vector next_x[kBackwardStep], next_dy[kBackwardStep];
#pragma unroll
                 for (int i = 0; i < kBackwardStep; ++i) {
                   next_x[i] = load<T, kLanes>(x + (t + i) * p.x.time_stride);
                   next_dy[i] = load<T, kLanes>(dy + (t + i) * p.dy.time_stride);
                 }
#pragma unroll
                 for (int i = 0; i < kBackwardStep; ++i) {
                   float g[kLanes], result[kLanes];
                   gradient(next_x[i], next_dy[i], true, g);
                   input_gradients(g, result);
                   store_global(dx + (t + i - kReach) * p.dx.time_stride, pack<T>(result));
                 }
                 t += kBackwardStep;
               } else {  // around the ends of the run
                 float g[kLanes] = {}, result[kLanes];
                 if (t < sequence.end) {
                   gradient(load<T, kLanes>(x + t * p.x.time_stride), load<T, kLanes>(dy + t * p.dy.time_stride),
                            t < end, g);
                 }
                 input_gradients(g, result);
                 const int64_t position = t - kReach;
                 if (position >= begin) {
#pragma unroll
                   for (int lane = 0; lane < kLanes; ++lane) {
                     result[lane] += final_state_gradient(p, sequence, channel + lane, position);
                   }
                   store_global(dx + position * p.dx.time_stride, pack<T>(result));
                 }
                 ++t;
               }
             }
           });

  if (!p.partials) return;
  float* target = static_cast<float*>(p.partials) + group * p.sums() * p.channels + channel;
  if (p.dweight.data) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k, target += p.channels) store_global(target, pack<float>(dweight[k]));
  }
  if (p.dbias.data) store_global(target, pack<float>(dbias));
}

template <typename T>
struct ChannelsBackward {
  template <int kWidth>
  struct Make {
    static Plan<BackwardParams> plan(const BackwardParams& params) {
      return make_plan<channels_backward_kernel<T, kWidth>>(params, params.channels / kBackwardLanes, kMinTile,
                                                            kBackwardWaves);
    }
  };
};

template <typename T>
Plan<BackwardParams> channels_backward(const BackwardParams& params) {
  return plan_for_width<ChannelsBackward<T>::template Make>(params);
}

}  // namespace inlay::conv::cuda
