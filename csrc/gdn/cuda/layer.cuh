// The step of a whole layer in one kernel. The value heads that share a key head are dealt out to the blocks of a
// cluster: each convolves the channels of q and k for itself, those of v and the rest for its own heads. The
// convolution's state of q and k is overwritten once all of them have read it. Where there are no clusters, one block
// has all of the heads, one after another.
#pragma once

#include <type_traits>

#include "common/cuda/launch.cuh"
#include "conv/cuda/step.cuh"
#include "gdn/cuda/gates.cuh"
#include "gdn/cuda/state_tile.cuh"
#include "gdn/layer.h"

namespace inlay::gdn::cuda {

struct LayerKernelParams {
  LayerStepParams layer;
  int blocks;    // of a cluster
  bool aligned;  // the states
  int first_sequence;
};

inline constexpr int kLayerLanes = 32;
inline constexpr int kLayerThreads = kLayerLanes * kGroups;
inline constexpr int kLayerTokens = static_cast<int>(kMaxStepTokens);

template <int kRows>
struct LayerShared : TileShared<kRows, kLayerLanes, kLayerTokens> {
  float v[kLayerTokens][kMaxHeadDim];  // then o
  float gate[kLayerTokens][kMaxHeadDim];
  float norm_weight[kMaxHeadDim];
};

__device__ inline void prefetch_element(const VectorTensor& vector, int64_t index) {
  prefetch_to_l2(static_cast<const char*>(vector.data) + index * size_of(vector.dtype));
}

// The value that storing x as T and loading it again gives.
template <typename T>
__device__ inline float rounded(float x) {
  return to_float(from_float<T>(x));
}

// kEvery: the state after each token is wanted too.
template <typename T, int kRows, bool kEvery>
__global__ void __launch_bounds__(kLayerThreads, kRows <= 8 ? 2 : 1)
    layer_step_kernel(const __grid_constant__ LayerKernelParams params) {
  using Tile = StateTile<kRows, kLayerLanes>;
  extern __shared__ uint4 dynamic_shared[];
  auto& shared = *reinterpret_cast<LayerShared<kRows>*>(dynamic_shared);
  const LayerStepParams& p = params.layer;
  const int keys = static_cast<int>(p.key_dim), values = static_cast<int>(p.value_dim);
  const int key_heads = static_cast<int>(p.key_heads), value_heads = static_cast<int>(p.value_heads);
  const int group = value_heads / key_heads, tokens = static_cast<int>(p.conv.time);
  const int rank = blockIdx.x, key_head = blockIdx.y, batch = params.first_sequence + blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool shares_keys = params.blocks > 1;

  // Channels [0, 2 keys) of q and k, then those of v of one head.
  const auto channel_of = [&](int i, int head) {
    if (i < keys) return key_head * keys + i;
    if (i < 2 * keys) return (key_heads + key_head - 1) * keys + i;
    return 2 * (key_heads - 1) * keys + head * values + i;
  };
  // What no kernel before this one computes is on its way from memory while that still runs.
  const int first_head = key_head * group + rank;
  Tile(keys, values, 0, params.aligned).prefetch(p.state.data, p.state.dtype, p.state.offset(batch, first_head));
#pragma unroll 1
  for (int i = threadIdx.x; i < 2 * keys + values; i += kLayerThreads) {
    const int64_t channel = channel_of(i, first_head);
    prefetch_to_l2(conv::cuda::StepChannel<T>::state_of(p.conv, batch, channel));
    prefetch_element(p.conv.weight, channel * p.conv.width);
  }
  if (threadIdx.x < values) prefetch_element(p.norm_weight, threadIdx.x);
  if (threadIdx.x == 0) prefetch_element(p.log_decay, first_head);
  if (threadIdx.x == 0) prefetch_element(p.dt_bias, first_head);
  wait_for_predecessor();
  release_successor();

  const auto result_of = [&](int i) {
    return i < keys ? &shared.q[0][i] : i < 2 * keys ? &shared.k[0][i - keys] : &shared.v[0][i - 2 * keys];
  };
  const auto convolve = [&](int i, int head, auto taps) {
    const int64_t channel = channel_of(i, head);
    const T* x = static_cast<const T*>(p.conv.x.data) + p.conv.x.offset(batch, 0, channel);
    float* result = result_of(i);
    const int pitch = i < 2 * keys ? Tile::kKeys : static_cast<int>(kMaxHeadDim);
    T input = *x;  // asked for ahead of its turn
    conv::cuda::StepChannel<T, decltype(taps)::value> own(p.conv, batch, channel);
#pragma unroll 1
    for (int token = 0; token < tokens; ++token, result += pitch) {
      const float now = to_float(input);
      if (token + 1 < tokens) input = *(x += p.conv.x.time_stride);
      *result = rounded<T>(own.next(p.conv, now));
    }
    if (!shares_keys || i >= 2 * keys) own.store_state(p.conv, batch, batch, channel);
  };
  const auto load_gates = [&](int head) {
    const int back = kLayerThreads - 1 - static_cast<int>(threadIdx.x);  // the convolution leaves the last warps idle
    if (back < tokens) {
      const Pending log_decay(p.log_decay.data, p.log_decay.dtype, head), bias(p.dt_bias.data, p.dt_bias.dtype, head);
      const Pending a(p.a.data, p.a.dtype, p.a.offset(batch, back, head));
      const Pending b(p.b.data, p.b.dtype, p.b.offset(batch, back, head));
      shared.decay[back] = expf(-expf(log_decay.value()) * softplus(a.value() + bias.value()));
      const float beta = static_cast<float>(p.beta_scale) * sigmoid<float>(b.value());
      shared.beta[back] = p.b.dtype == DType::f32 ? beta : rounded<T>(beta);
    }
#pragma unroll 1
    for (int i = back; i < tokens * values; i += kLayerThreads) {
      const int token = i / values, column = i - token * values;
      const float z = to_float(static_cast<const T*>(p.z.data)[p.z.offset(batch, token, head) + column]);
      shared.gate[token][column] = z * sigmoid<T>(z);
    }
  };
  // Row `warp` of o, which has been rounded, in the steps of Hugging Face's gated norm.
  const auto normalise = [&](int head) {
    if (warp >= tokens) return;
    float square_sum = 0.0f;
#pragma unroll 1
    for (int i = lane; i < values; i += 32) square_sum = __fmaf_rn(shared.v[warp][i], shared.v[warp][i], square_sum);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) square_sum += __shfl_xor_sync(0xffffffffu, square_sum, offset);
    const float rstd = rsqrtf(square_sum / static_cast<float>(values) + static_cast<float>(p.eps));
    const bool rounds_product = p.norm_weight.dtype == kDType<T>;
    T* const y = static_cast<T*>(p.y.data) + ((int64_t{batch} * tokens + warp) * value_heads + head) * values;
#pragma unroll 1
    for (int i = lane; i < values; i += 32) {
      float product = __fmul_rn(rounded<T>(__fmul_rn(shared.v[warp][i], rstd)), shared.norm_weight[i]);
      if (rounds_product) product = rounded<T>(product);
      y[i] = from_float<T>(__fmul_rn(product, shared.gate[warp][i]));
    }
  };

#pragma unroll 1
  for (int own_head = rank; own_head < group; own_head += params.blocks) {
    const int head = key_head * group + own_head;
    const bool is_first = own_head == rank;
    load_gates(head);
#pragma unroll 1
    for (int i = threadIdx.x + (is_first ? 0 : 2 * keys); i < 2 * keys + values; i += kLayerThreads) {
      if (p.conv.width <= 4) {
        convolve(i, head, std::integral_constant<int, 4>{});
      } else {
        convolve(i, head, std::integral_constant<int, static_cast<int>(conv::kMaxWidth)>{});
      }
    }
#pragma unroll 1
    for (int i = threadIdx.x; is_first && i < values; i += kLayerThreads) {
      shared.norm_weight[i] = value(p.norm_weight, i);
    }
    if (is_first) {
      __syncthreads();
      if (shares_keys) arrive_at_cluster();  // all threads have convolved
      if (warp < tokens) {
        const auto read = [&](int which, int piece, float (&row)[kPiece]) {
          const float* const source = (which == 0 ? shared.q : shared.k)[warp] + piece * kPiece;
#pragma unroll
          for (int i = 0; i < kPiece; ++i) row[i] = source[i];
        };
        shared.prepare_keys(warp, keys, static_cast<float>(p.scale), true, read);
      }
    }
#pragma unroll 1
    for (int first_column = 0; first_column < values; first_column += Tile::kColumns) {
      Tile tile(keys, values, first_column, params.aligned);
      tile.load(p.state.data, p.state.dtype, p.state.offset(batch, head));
      __syncthreads();
      tile.widen(p.state.dtype);
#pragma unroll 1
      for (int token = 0; token < tokens; ++token) {
        tile.step(
            shared, token,
            [&](int column) { return first_column + column < values ? shared.v[token][first_column + column] : 0.0f; },
            [&](int column, float o) {
              if (first_column + column < values) shared.v[token][first_column + column] = rounded<T>(o);
            });
        if constexpr (kEvery) {
          const int64_t row = (int64_t{batch} * tokens + token) * value_heads + head;
          tile.store(p.states_out.data, p.states_out.dtype, row * keys * values);
        }
      }
      tile.store(p.state.data, p.state.dtype, p.state.offset(batch, head));
    }
    normalise(head);
    __syncthreads();  // the next head overwrites what the norm reads
  }

  if (!shares_keys) return;
  wait_for_cluster();
  if (rank != 0) return;
#pragma unroll 1
  for (int i = threadIdx.x; i < 2 * keys; i += kLayerThreads) {
    conv::cuda::StepChannel<T>::advance(p.conv, batch, batch, channel_of(i, 0));
  }
}

}  // namespace inlay::gdn::cuda
