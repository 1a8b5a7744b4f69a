// What the kernels with the channels innermost share: each thread owns some neighbouring channels of a group of tokens
// and walks through time, with the inputs under the taps in registers.
#pragma once

#include "common/cuda/launch.cuh"
#include "conv/cuda/config.h"
#include "conv/cuda/launch.h"
#include "conv/cuda/maths.cuh"

namespace inlay::conv::cuda {

// A thread's group of tokens and its first channel. Threads beside each other have channels beside each other.
struct Owned {
  int64_t group;
  int64_t channel;
};

__device__ inline Owned owned_by_thread(int64_t channels, int lanes) {
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t vectors = static_cast<uint32_t>(channels) / lanes;
  const uint32_t group = thread / vectors;
  return {group, int64_t{thread - group * vectors} * lanes};
}

// Weights and bias of kLanes channels.
template <int kWidth, int kLanes>
struct ChannelWeights {
  float weight[kWidth][kLanes];
  float bias[kLanes];

  __device__ ChannelWeights(const Convolution& p, int64_t channel) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      float part[kLanes];
      load_as_float(p.weight.data, p.weight.dtype, channel * kWidth + j * kLanes, part);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) weight[(j * kLanes + i) % kWidth][(j * kLanes + i) / kWidth] = part[i];
    }
#pragma unroll
    for (int i = 0; i < kLanes; ++i) bias[i] = 0.0f;
    if (p.bias.data) load_as_float(p.bias.data, p.bias.dtype, channel, bias);
  }
};

// The last kCount values of some channels, oldest first.
template <int kCount, int kLanes>
struct Window {
  float values[kCount][kLanes];

  __device__ void push(const float (&newest)[kLanes]) {
#pragma unroll
    for (int i = 0; i + 1 < kCount; ++i) {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) values[i][lane] = values[i + 1][lane];
    }
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) values[kCount - 1][lane] = newest[lane];
  }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) values[i][lane] = 0.0f;
    }
  }
};

// The inputs before token t.
template <typename T, int kCount, int kLanes>
__device__ inline void load_window(const Convolution& p, const Sequence& sequence, int64_t batch, int64_t channel,
                                   int64_t t, Window<kCount, kLanes>& window) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int64_t position = t - kCount + i;
    if (position >= sequence.begin) {
      const T* const source = static_cast<const T*>(p.x.data) + p.x.offset(batch, position, channel);
      unpack(load<T, kLanes>(source), window.values[i]);
    } else {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        window.values[i][lane] = input_at(p, sequence, batch, channel + lane, position);
      }
    }
  }
}

// Preactivations of a token, from the inputs before it and its own.
template <int kWidth, int kLanes>
__device__ inline void preactivations(const ChannelWeights<kWidth, kLanes>& weights,
                                      const Window<kWidth - 1, kLanes>& window, const float (&input)[kLanes],
                                      float (&z)[kLanes]) {
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    z[lane] = preactivation<kWidth>([&](int k) { return weights.weight[k][lane]; },
                                    [&](int k) { return k + 1 < kWidth ? window.values[k][lane] : input[lane]; },
                                    weights.bias[lane]);
  }
}

// Calls body(sequence, batch, begin, end) for each run of a group's tokens that lie in one tile and one sequence.
template <class Body>
__device__ inline void for_runs(const Convolution& p, const Tiling& tiling, int64_t group, Body body) {
  const int64_t first_tile = group * tiling.tiles_per_group;
  for (int64_t i = 0; i < tiling.tiles_per_group && first_tile + i < tiling.all_tiles; ++i) {
    const int64_t batch = static_cast<uint32_t>(first_tile + i) / static_cast<uint32_t>(tiling.tiles);
    const int64_t first = (first_tile + i - batch * tiling.tiles) * tiling.tile;
    const int64_t last = first + tiling.tile < p.time ? first + tiling.tile : p.time;
    for (int64_t begin = first; begin < last;) {
      const Sequence sequence = p.sequences.find(batch, begin);
      const int64_t end = sequence.end < last ? sequence.end : last;
      body(sequence, batch, begin, end);
      begin = end;
    }
  }
}

}  // namespace inlay::conv::cuda
