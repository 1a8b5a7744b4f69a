// Kernels for what the fast ones leave, an element at a time, with dtype and width known at run time: forward and
// backward of any alignment and of widths beyond 4, final states, and the initial state's gradient.
//
// Neighbouring threads work on neighbours in memory. The same formulas in the same order as in the fast kernels.
#pragma once

#include "common/cuda/launch.cuh"
#include "conv/cuda/config.h"
#include "conv/cuda/launch.h"
#include "conv/cuda/maths.cuh"

namespace inlay::conv::cuda {

// Calls body(zero) with a zero of the dtype's element type, for functions whose accuracy depends on it.
template <class Body>
__device__ inline float with_element(DType dtype, Body body) {
  if (dtype == DType::f32) return body(float{});
  if (dtype == DType::bf16) return body(__nv_bfloat16{});
  return body(__half{});
}

__device__ inline float weight_at(const VectorTensor& weight, int64_t width, int64_t channel, int64_t k) {
  return load_one(weight.data, weight.dtype, channel * width + k);
}

__device__ inline float bias_at(const VectorTensor& bias, int64_t channel) {
  return bias.data ? load_one(bias.data, bias.dtype, channel) : 0.0f;
}

// sum of weight * input(k) over the taps, plus the bias
template <class Input>
__device__ inline float any_preactivation(const VectorTensor& weight, const VectorTensor& bias, int64_t width,
                                          int64_t channel, Input input) {
  float z = 0.0f;
  for (int64_t k = 0; k < width; ++k) z = __fmaf_rn(weight_at(weight, width, channel, k), input(k), z);
  return __fadd_rn(z, bias_at(bias, channel));
}

template <class Params>
__device__ inline float any_activate(const Params& p, float z) {
  return with_element(p.dtype, [&](auto zero) {
    float values[1] = {z};
    activate<decltype(zero)>(p.activation, p.rounds_preactivation, values);
    return values[0];
  });
}

__device__ inline float preactivation_at(const Convolution& p, const Sequence& sequence, int64_t batch, int64_t channel,
                                         int64_t t) {
  return any_preactivation(p.weight, p.bias, p.width, channel,
                           [&](int64_t k) { return input_at(p, sequence, batch, channel, t - (p.width - 1) + k); });
}

// Gradient of the preactivation of token t, zero behind the sequence.
__device__ inline float gradient_at(const BackwardParams& p, const Sequence& sequence, int64_t batch, int64_t channel,
                                    int64_t t) {
  if (t >= sequence.end) return 0.0f;
  const float upstream = load_one(p.dy.data, p.dtype, p.dy.offset(batch, t, channel));
  const float z = preactivation_at(p, sequence, batch, channel, t);
  return with_element(p.dtype,
                      [&](auto zero) { return through_activation<decltype(zero)>(p.activation, upstream, z); });
}

__global__ void __launch_bounds__(kThreads, kMinBlocks)
    general_forward_kernel(const __grid_constant__ Work<ForwardParams> work) {
  const ForwardParams& p = work.params;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t inner_size = p.time_contiguous ? p.time : p.channels;
  const int64_t outer = thread / inner_size;
  const int64_t inner = thread - outer * inner_size;
  const int64_t outer_size = p.time_contiguous ? p.channels : p.time;
  const int64_t batch = outer / outer_size;
  const int64_t t = p.time_contiguous ? inner : outer - batch * outer_size;
  const int64_t channel = p.time_contiguous ? outer - batch * outer_size : inner;
  wait_for_predecessor();
  release_successor();
  if (batch >= p.batch) return;
  const float z = preactivation_at(p, p.sequences.find(batch, t), batch, channel, t);
  store_one(p.y.data, p.dtype, p.y.offset(batch, t, channel), any_activate(p, z));
}

// One channel of a group of tokens (tiles of one token) a thread or, with the tokens innermost, a warp.
template <int kShare>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    general_backward_kernel(const __grid_constant__ Work<BackwardParams> work) {
  const BackwardParams& p = work.params;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t group = thread / kShare / p.channels;
  const int64_t channel = thread / kShare - group * p.channels;
  wait_for_predecessor();
  release_successor();
  if (group >= work.tiling.groups) return;
  float sums[kMaxWidth + 1] = {};  // dweight, then dbias in the last
  const int64_t first = group * work.tiling.tiles_per_group;
  const int64_t last = min(first + work.tiling.tiles_per_group, work.tiling.all_tiles);
  int64_t batch = (first + threadIdx.x % kShare) / p.time;
  int64_t t = first + threadIdx.x % kShare - batch * p.time;
  for (int64_t token = first + threadIdx.x % kShare; token < last; token += kShare, t += kShare) {
    for (; t >= p.time; t -= p.time) ++batch;
    const Sequence sequence = p.sequences.find(batch, t);
    float dx = 0.0f;
#pragma unroll 1
    for (int64_t k = 0; k < p.width; ++k) {
      const float g = gradient_at(p, sequence, batch, channel, t + p.width - 1 - k);
      dx = __fmaf_rn(weight_at(p.weight, p.width, channel, k), g, dx);
      if (k == p.width - 1) {  // the token's own
#pragma unroll
        for (int tap = 0; tap < kMaxWidth; ++tap) {
          if (tap >= p.width) continue;
          sums[tap] = __fmaf_rn(g, input_at(p, sequence, batch, channel, t - (p.width - 1) + tap), sums[tap]);
        }
        sums[kMaxWidth] += g;
      }
    }
    dx += final_state_gradient(p, sequence, channel, t);
    store_one(p.dx.data, p.dtype, p.dx.offset(batch, t, channel), dx);
  }
  if (!p.partials) return;
#pragma unroll
  for (int offset = kShare / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (float& sum : sums) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  if (threadIdx.x % kShare != 0) return;
  float* target = static_cast<float*>(p.partials) + group * p.sums() * p.channels + channel;
  if (p.dweight.data) {
#pragma unroll
    for (int k = 0; k < kMaxWidth; ++k) {
      if (k >= p.width) continue;
      *target = sums[k];
      target += p.channels;
    }
  }
  if (p.dbias.data) *target = sums[kMaxWidth];
}

// One channel of one sequence a thread, here and in the next kernel.
__global__ void __launch_bounds__(kThreads, kMinBlocks) final_state_kernel(const __grid_constant__ ForwardParams p) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t index = thread / p.channels;
  const int64_t channel = thread - index * p.channels;
  wait_for_predecessor();
  release_successor();
  if (index >= p.sequences.count) return;
  const Sequence sequence = p.sequences[index];
  for (int64_t column = 0; column < p.width - 1; ++column) {
    const int64_t position = sequence.end - (p.width - 1) + column;
    const float value = input_at(p, sequence, p.sequences.batch_of(index), channel, position);
    store_one(p.final_state.data, p.dtype, p.final_state.offset(index, channel, column), value);
  }
}

// Column i of the initial state is the input at position begin - (width - 1) + i, so its gradient is dx there.
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    initial_state_gradient_kernel(const __grid_constant__ BackwardParams p) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t index = thread / p.channels;
  const int64_t channel = thread - index * p.channels;
  wait_for_predecessor();
  release_successor();
  if (index >= p.sequences.count) return;
  const Sequence sequence = p.sequences[index];
  const int64_t batch = p.sequences.batch_of(index);
  for (int64_t column = 0; column < p.width - 1; ++column) {
    float sum = 0.0f;
    for (int64_t k = 0; k <= column; ++k) {
      const float g = gradient_at(p, sequence, batch, channel, sequence.begin + column - k);
      sum = __fmaf_rn(weight_at(p.weight, p.width, channel, k), g, sum);
    }
    sum += final_state_gradient(p, sequence, channel, sequence.begin - (p.width - 1) + column);
    store_one(p.dinitial_state.data, p.dtype, p.dinitial_state.offset(index, channel, column), sum);
  }
}

}  // namespace inlay::conv::cuda
