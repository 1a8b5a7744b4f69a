// Forward and backward for what the register kernels leave: heads of any width and alignment, rotated in any number of
// channels.
//
// Same maths, a warp a head, an element at a time, in the tensors' own dtypes. A lane holds whole pairs of channels:
// every 32nd pair, then every 32nd channel of those that pass. So in the backward each channel belongs to one lane,
// which adds its sums up in the block's row of `partials` itself; a block is one warp there.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vector.cuh"
#include "rope/cuda/config.h"
#include "rope/params.h"

namespace inlay::rope::cuda {

using namespace inlay::cuda;

inline constexpr int kWarp = 32;
inline constexpr int kGeneralThreads = 128;  // of the forward

__device__ inline float load_one(const void* data, DType dtype, int64_t index) {
  float value[1];
  load_as_float(data, dtype, index, value);
  return value[0];
}

__device__ inline void store_one(const OutputTensor& tensor, int64_t index, float x) {
  const float value[1] = {x};
  store_from_float(tensor.data, tensor.dtype, index, value);
}

__device__ inline float rounded(float x, DType dtype) {
  if (dtype == DType::bf16) return to_float(from_float<__nv_bfloat16>(x));
  if (dtype == DType::f16) return to_float(from_float<__half>(x));
  return x;
}

// weight + offset of a channel.
__device__ inline float load_weight(const Problem& p, const VectorTensor& weight, int64_t channel) {
  return load_one(weight.data, weight.dtype, channel) + static_cast<float>(p.weight_offset);
}

// Two channels that are rotated together, and their angles; sin is negative for the first.
struct Pair {
  __device__ Pair(const Problem& p, int64_t index, int64_t cos_row, int64_t sin_row) {
    channel[0] = p.interleaved ? 2 * index : index;
    channel[1] = p.interleaved ? 2 * index + 1 : index + p.half();
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      cos[j] = load_one(p.cos.data, p.angles, cos_row + p.angle_column(channel[j]));
      sin[j] = load_one(p.sin.data, p.angles, sin_row + p.angle_column(channel[j]));
    }
    sin[0] = -sin[0];
  }

  int64_t channel[2];
  float cos[2], sin[2];
};

// A head among all heads of a side.
struct Head {
  __device__ Head(const Problem& p, int64_t heads, int64_t row) {
    const int64_t all_tokens = row / heads;
    head = row - all_tokens * heads;
    batch = all_tokens / p.tokens;
    token = all_tokens - batch * p.tokens;
    cos_row = p.cos.offset(batch, token);
    sin_row = p.sin.offset(batch, token);
  }

  int64_t batch, token, head;
  int64_t cos_row, sin_row;
};

__global__ void __launch_bounds__(kGeneralThreads) forward_general_kernel(const __grid_constant__ ForwardParams p) {
  using Sum = GroupSum<kWarp, kGeneralThreads, 1>;
  __shared__ typename Sum::Scratch scratch;
  Sum warp_sum(scratch);
  const int lane = threadIdx.x % kWarp;
  wait_for_predecessor();
  release_successor();
  const int64_t q_rows = p.batch * p.tokens * p.q.heads;
  const int64_t rows = q_rows + p.batch * p.tokens * p.k.heads;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kGeneralThreads / kWarp);
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * (kGeneralThreads / kWarp) + threadIdx.x / kWarp; index < rows;
       index += step) {
    const bool of_q = index < q_rows;
    const ForwardSide& side = of_q ? p.q : p.k;
    const int64_t row = of_q ? index : index - q_rows;
    const Head at(p, side.heads, row);
    const int64_t source = side.x.offset(at.batch, at.token, at.head);
    float rstd = 1.0f;
    if (p.normalises) {
      float square_sum[1] = {0.0f};
      for (int64_t i = lane; i < p.width; i += kWarp) {
        const float x = load_one(side.x.data, p.dtype, source + i);
        square_sum[0] += x * x;
      }
      warp_sum(square_sum);
      rstd = rsqrtf(square_sum[0] / static_cast<float>(p.width) + static_cast<float>(p.eps));
    }
    const auto value = [&](int64_t channel) {
      float x = load_one(side.x.data, p.dtype, source + channel);
      if (!p.normalises) return x;
      x *= rstd;
      if (side.rounds_normalised) x = rounded(x, p.dtype);
      x *= load_weight(p, side.weight, channel);
      return side.rounds_weighted ? rounded(x, p.dtype) : x;
    };
    const auto product = [&](float x, float angle) {
      return side.rounds_products ? rounded(x * angle, p.dtype) : x * angle;
    };
    for (int64_t i = lane; i < p.half(); i += kWarp) {
      const Pair pair(p, i, at.cos_row, at.sin_row);
      const float m[2] = {value(pair.channel[0]), value(pair.channel[1])};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        store_one(side.y, row * p.width + pair.channel[j], product(m[j], pair.cos[j]) + product(m[1 - j], pair.sin[j]));
      }
    }
    for (int64_t i = p.rotary + lane; i < p.width; i += kWarp) store_one(side.y, row * p.width + i, value(i));
  }
}

// A block of one warp works on q or on k.
__global__ void __launch_bounds__(kWarp, 16) backward_general_kernel(const __grid_constant__ BackwardParams p) {
  using Sum = GroupSum<kWarp, kWarp, 2>;
  __shared__ typename Sum::Scratch scratch;
  Sum warp_sum(scratch);
  const int lane = threadIdx.x;
  wait_for_predecessor();
  release_successor();
  const int64_t q_blocks = blocks_of_q(gridDim.x, p.q.heads, p.k.heads, 1);
  const bool of_q = blockIdx.x < q_blocks;
  const BackwardSide& side = of_q ? p.q : p.k;
  const int64_t block = of_q ? blockIdx.x : blockIdx.x - q_blocks;
  const int64_t blocks = of_q ? q_blocks : gridDim.x - q_blocks;
  const int64_t rows = p.batch * p.tokens * side.heads;
  float* const dweight = side.partials ? static_cast<float*>(side.partials) + block * p.width : nullptr;

  // Calls body(channel, dm) for each of the lane's channels.
  const auto for_channels = [&](const Head& at, int64_t dy, auto body) {
    for (int64_t i = lane; i < p.half(); i += kWarp) {
      const Pair pair(p, i, at.cos_row, at.sin_row);
      const float first = load_one(side.dy.data, p.dtype, dy + pair.channel[0]);
      const float second = load_one(side.dy.data, p.dtype, dy + pair.channel[1]);
      body(pair.channel[0], first * pair.cos[0] + second * pair.sin[1]);
      body(pair.channel[1], second * pair.cos[1] + first * pair.sin[0]);
    }
    for (int64_t i = p.rotary + lane; i < p.width; i += kWarp) body(i, load_one(side.dy.data, p.dtype, dy + i));
  };

  if (dweight) {
    for (int64_t i = lane; i < p.half(); i += kWarp) {
      dweight[p.interleaved ? 2 * i : i] = 0.0f;
      dweight[p.interleaved ? 2 * i + 1 : i + p.half()] = 0.0f;
    }
    for (int64_t i = p.rotary + lane; i < p.width; i += kWarp) dweight[i] = 0.0f;
  }
  for (int64_t row = block; row < rows; row += blocks) {
    const Head at(p, side.heads, row);
    const int64_t dy = side.dy.offset(at.batch, at.token, at.head);
    const int64_t source = side.x.offset(at.batch, at.token, at.head);
    if (!p.normalises) {
      for_channels(at, dy, [&](int64_t channel, float dm) { store_one(side.dx, row * p.width + channel, dm); });
      continue;
    }
    float sums[2] = {0.0f, 0.0f};  // of x * x and of g * x
    for_channels(at, dy, [&](int64_t channel, float dm) {
      const float x = load_one(side.x.data, p.dtype, source + channel);
      sums[0] += x * x;
      sums[1] += dm * load_weight(p, side.weight, channel) * x;
    });
    warp_sum(sums);
    const float rstd = rsqrtf(sums[0] / static_cast<float>(p.width) + static_cast<float>(p.eps));
    const float mean_dot = sums[1] * rstd / static_cast<float>(p.width);
    for_channels(at, dy, [&](int64_t channel, float dm) {
      const float n = load_one(side.x.data, p.dtype, source + channel) * rstd;
      const float dx = (dm * load_weight(p, side.weight, channel) - n * mean_dot) * rstd;
      store_one(side.dx, row * p.width + channel, dx);
      if (dweight) dweight[channel] += dm * n;
    });
  }
}

}  // namespace inlay::rope::cuda
