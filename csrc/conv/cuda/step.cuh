// One channel of one sequence, a few tokens on top of its state: what the step of the convolution and that of a whole
// Gated DeltaNet layer share.
#pragma once

#include "conv/cuda/maths.cuh"

namespace inlay::conv::cuda {

// taps[k] is what weight[k] meets, oldest first; k beyond the width, which is at most kTaps, is unused.
template <typename T, int kTaps = static_cast<int>(kMaxWidth)>
struct StepChannel {
  float weight[kTaps];
  float taps[kTaps];
  float bias;

  __device__ StepChannel(const StepParams& p, int64_t slot, int64_t channel) {
    const T* const state = state_of(p, slot, channel) + (p.columns - p.width) * p.state.column_stride;
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      // The oldest tap falls out with the first token, and the state need not have it.
      taps[k] = k > 0 && k < p.width ? to_float(state[k * p.state.column_stride]) : 0.0f;
    }
    if (p.weight.dtype == DType::f32) {
      load_weight(static_cast<const float*>(p.weight.data), p.width, channel);
    } else if (p.weight.dtype == DType::bf16) {
      load_weight(static_cast<const __nv_bfloat16*>(p.weight.data), p.width, channel);
    } else {
      load_weight(static_cast<const __half*>(p.weight.data), p.width, channel);
    }
    bias = p.bias.data ? load_one(p.bias.data, p.bias.dtype, channel) : 0.0f;
  }

  // One branch for all elements, whose loads are then under way together.
  template <typename W>
  __device__ void load_weight(const W* source, int64_t width, int64_t channel) {
#pragma unroll
    for (int k = 0; k < kTaps; ++k) weight[k] = k < width ? to_float(source[channel * width + k]) : 0.0f;
  }

  __device__ static T* state_of(const StepParams& p, int64_t slot, int64_t channel) {
    return static_cast<T*>(p.state.data) + p.state.offset(slot, channel, 0);
  }

  // The output for the next token, not yet rounded.
  __device__ float next(const StepParams& p, float input) {
    float z[1] = {0.0f};
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      if (k >= p.width) continue;
      taps[k] = k + 1 < p.width ? taps[k + 1 < kTaps ? k + 1 : k] : input;
      z[0] = __fmaf_rn(weight[k], taps[k], z[0]);
    }
    z[0] = __fadd_rn(z[0], bias);
    activate<T>(p.activation, p.rounds_preactivation, z);
    return z[0];
  }

  // Leaves the newest inputs behind, in place, once all tokens have passed.
  __device__ void store_state(const StepParams& p, int64_t slot, int64_t row, int64_t channel) const {
    if (p.columns > p.width) {
      advance(p, slot, row, channel);
      return;
    }
    T* const state = state_of(p, slot, channel) + (p.columns - p.width) * p.state.column_stride;
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      if (k >= p.width - p.columns && k < p.width) state[k * p.state.column_stride] = from_float<T>(taps[k]);
    }
  }

  // The same from memory: a column takes a later one's value, or a token's.
  __device__ static void advance(const StepParams& p, int64_t slot, int64_t row, int64_t channel) {
    T* const state = state_of(p, slot, channel);
    const T* const x = static_cast<const T*>(p.x.data) + p.x.offset(row, 0, channel);
#pragma unroll 1
    for (int64_t column = 0; column < p.columns; ++column) {
      const int64_t newer = column + p.time;
      state[column * p.state.column_stride] =
          newer < p.columns ? state[newer * p.state.column_stride] : x[(newer - p.columns) * p.x.time_stride];
    }
  }
};

}  // namespace inlay::conv::cuda
