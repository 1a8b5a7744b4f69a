// Backward over heads that fit in registers: dx, and partial sums of dweight. With n = x * rstd, w = weight + offset,
// <.> the mean over a head:
//   dm = dy turned back: dm = dy cos + (dy sin) of the partner, sin negative for the first channel of a pair
//   dx = rstd * (g - n * <g n>),  g = dm * w          where there is no norm, dx = dm
//   dweight = sum over heads of dm * n
//
// The first blocks work on q, the others on k. The grid is as large as fits on the chip; its warps walk the tokens, a
// group of threads a head at a time, and copy their next heads into shared memory while they work on these. rstd is not
// read but worked out again: its sum is taken together with <g n>, as <g x>. Each thread keeps its channels' sums in
// float32 registers over all heads of its block; the block adds its groups in order and writes one row of `partials`,
// and a second kernel adds those in order: the same bits every run.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/pipeline.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vector.cuh"
#include "rope/cuda/config.h"
#include "rope/cuda/maths.cuh"
#include "rope/params.h"

namespace inlay::rope::cuda {

using namespace inlay::cuda;

template <bool kNorm, int kIndex>
using BackwardBuffer =
    RowBuffer<kNorm ? 2 : 1, 2 * kBackwardShapes[kIndex].heads, kBackwardShapes[kIndex].threads, kStages>;  // dy, x

// A token and the first of the heads that a warp works on together.
struct Place {
  uint32_t batch, token;
  uint32_t head;
};

// dy turned back: the gradient of what was rotated.
template <bool kInterleaved, typename Share, typename Angles>
__device__ inline void turn_back(const Share& share, const Angles& angles, float (&dy)[2][Share::kLanes]) {
  constexpr int kLanes = Share::kLanes;
  float cos[2][kLanes], sin[2][kLanes];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (!share.rotates[j]) continue;
    widen(angles.cos[j], cos[j]);
    widen(angles.sin[j], sin[j]);
    if constexpr (kInterleaved) {
#pragma unroll
      for (int i = 0; i < kLanes; i += 2) {
        const float first = dy[j][i], second = dy[j][i + 1];
        dy[j][i] = first * cos[j][i] + second * sin[j][i + 1];
        dy[j][i + 1] = second * cos[j][i + 1] - first * sin[j][i];
      }
    }
  }
  if constexpr (!kInterleaved) {
    if (!share.rotates[0]) return;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const float first = dy[0][i], second = dy[1][i];
      dy[0][i] = first * cos[0][i] + second * sin[1][i];
      dy[1][i] = second * cos[1][i] - first * sin[0][i];
    }
  }
}

// `block` of the `blocks` that work on this side.
template <typename T, typename C, bool kNorm, bool kInterleaved, int kIndex>
__device__ __forceinline__ void backward_heads(const BackwardParams& p, const BackwardSide& side, uint32_t block,
                                               uint32_t blocks) {
  constexpr Shape kShape = kBackwardShapes[kIndex];
  constexpr int kGroup = kShape.group;
  constexpr int kGroups = 32 / kGroup;  // of a warp
  constexpr int kHeads = kShape.heads;
  constexpr int kLanes = kPerAccess<T>;
  using Sum = GroupSum<kGroup, kShape.threads, 2>;
  __shared__ typename Sum::Scratch scratch;
  extern __shared__ uint4 dynamic_shared[];
  auto& buffer = *reinterpret_cast<BackwardBuffer<kNorm, kIndex>*>(dynamic_shared);

  // All counts are below 2^31: see launch.cu.
  const uint32_t heads = static_cast<uint32_t>(side.heads);
  const uint32_t tokens = static_cast<uint32_t>(p.tokens);
  const uint32_t parts = (heads + kShape.heads_of_warp() - 1) / kShape.heads_of_warp();  // of a token
  const uint32_t units = static_cast<uint32_t>(p.batch) * tokens * parts;
  const uint32_t unit_step = blocks * kShape.warps();
  const uint32_t group = threadIdx.x % 32 / kGroup;
  const Share<T, kGroup, kInterleaved> share(p);

  const auto locate = [&](uint32_t unit) {
    Place place;
    const uint32_t row = unit / parts;
    place.head = (unit - row * parts) * kShape.heads_of_warp();
    place.batch = row / tokens;
    place.token = row - place.batch * tokens;
    return place;
  };
  const auto fetch_tensor = [&](int stage, int index, const TokenTensor& tensor, const Place& place) {
    const T* row = static_cast<const T*>(tensor.data) + tensor.offset(place.batch, place.token, place.head + group);
#pragma unroll
    for (int i = 0; i < kHeads; ++i, row += kGroups * tensor.head_stride) {
      if (!share.owns || place.head + group + i * kGroups >= heads) break;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        copy_async(&buffer.parts[stage][index][2 * i + j][threadIdx.x], row + share.channel[j]);
      }
    }
  };
  const auto fetch = [&](int stage, const Place& place) {
    fetch_tensor(stage, 0, side.dy, place);
    if constexpr (kNorm) fetch_tensor(stage, 1, side.x, place);
  };
  uint32_t unit = block * kShape.warps() + threadIdx.x / 32;
  Place next{};
  if (unit < units) {
    next = locate(unit);
    fetch(0, next);
  }
  commit_copies();
  // weight + offset, in shared memory for want of registers: part c of every thread of a group side by side.
  constexpr int kParts = kLanes / 4;
  __shared__ float4 weights[2 * kParts][kGroup];
  if constexpr (kNorm) {
    if (threadIdx.x < kGroup) {
      float values[2][kLanes] = {};
      load_weights(p, side.weight, share, values);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < kLanes; i += 4) {
          weights[j * kParts + i / 4][threadIdx.x] = {values[j][i], values[j][i + 1], values[j][i + 2],
                                                      values[j][i + 3]};
        }
      }
    }
    __syncthreads();
  }
  const auto read_weights = [&](int j, float (&values)[kLanes]) {
#pragma unroll
    for (int i = 0; i < kLanes; i += 4) {
      const float4 part = weights[j * kParts + i / 4][threadIdx.x % kGroup];
      values[i] = part.x;
      values[i + 1] = part.y;
      values[i + 2] = part.z;
      values[i + 3] = part.w;
    }
  };
  float dweight[2][kLanes] = {};
  const float scale = 1.0f / static_cast<float>(p.width);

  for (int stage = 0; unit < units; unit += unit_step, stage ^= 1) {
    const Place place = next;
    Angles<C, kLanes, kInterleaved> angles;
    angles.load(p, share, place.batch, place.token);
    if (unit + unit_step < units) {
      next = locate(unit + unit_step);
      fetch(stage ^ 1, next);
    }
    commit_copies();
    wait_for_copies<1>();

    T* target =
        static_cast<T*>(side.dx.data) + ((place.batch * p.tokens + place.token) * heads + place.head + group) * p.width;
#pragma unroll 1
    for (int i = 0; i < kHeads; ++i, target += kGroups * p.width) {
      if (place.head + i * kGroups >= heads) break;  // the whole warp: shuffles need it
      const bool works = share.owns && place.head + group + i * kGroups < heads;
      asm volatile("" ::: "memory");  // nothing of the shared memory stays in registers from head to head
      float dm[2][kLanes] = {};
      if (works) {
#pragma unroll
        for (int j = 0; j < 2; ++j) widen(buffer.template read<T>(stage, 0, 2 * i + j), dm[j]);
        angles.keep_packed();
        turn_back<kInterleaved>(share, angles, dm);
      }
      if constexpr (!kNorm) {
        if (!works) continue;
#pragma unroll
        for (int j = 0; j < 2; ++j) store_global(target + share.channel[j], pack<T>(dm[j]));
      } else {
        float sums[2] = {0.0f, 0.0f};  // of x * x and of g * x
        if (works) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float v[kLanes], w[kLanes];
            widen(buffer.template read<T>(stage, 1, 2 * i + j), v);
            read_weights(j, w);
#pragma unroll
            for (int l = 0; l < kLanes; ++l) {
              sums[0] += v[l] * v[l];
              sums[1] += dm[j][l] * w[l] * v[l];
            }
          }
        }
        Sum{scratch}(sums);
        if (!works) continue;
        asm volatile("" ::: "memory");  // x and the weights are read anew
        const float rstd = rsqrtf(sums[0] * scale + static_cast<float>(p.eps));
        const float x_factor = -(sums[1] * rstd * scale) * rstd * rstd;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float v[kLanes], w[kLanes], dx[kLanes];
          widen(buffer.template read<T>(stage, 1, 2 * i + j), v);
          read_weights(j, w);
#pragma unroll
          for (int l = 0; l < kLanes; ++l) {
            const float scaled = dm[j][l] * rstd;
            dx[l] = scaled * w[l] + v[l] * x_factor;
            dweight[j][l] += scaled * v[l];
          }
          store_global(target + share.channel[j], pack<T>(dx));
        }
      }
    }
  }

  if constexpr (kNorm) {
    if (!side.partials) return;
    // One row of `partials` a block: its groups' sums, added in order. The buffer is free once all copies have come.
    constexpr int kWidest = kShape.max_vectors() * kLanes;
    float* const columns = reinterpret_cast<float*>(dynamic_shared);
    static_assert(sizeof(buffer) >= kShape.groups() * kWidest * sizeof(float));
    wait_for_copies<0>();
    __syncthreads();
    if (share.owns) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float* const own = columns + threadIdx.x / kGroup * kWidest + share.channel[j];
#pragma unroll
        for (int i = 0; i < kLanes; i += 4) {
          *reinterpret_cast<float4*>(own + i) = {dweight[j][i], dweight[j][i + 1], dweight[j][i + 2],
                                                 dweight[j][i + 3]};
        }
      }
    }
    __syncthreads();
    float* const partials = static_cast<float*>(side.partials) + block * p.width;
    for (int column = threadIdx.x; column < p.width; column += kShape.threads) {
      float total = columns[column];
#pragma unroll
      for (int group = 1; group < kShape.groups(); ++group) total += columns[group * kWidest + column];
      partials[column] = total;
    }
  }
}

// Angles wider than T take twice the registers.
template <typename T, typename C, int kIndex>
constexpr int kResidentBlocks =
    sizeof(C) == sizeof(T) ? kBackwardShapes[kIndex].blocks : kBackwardShapes[kIndex].blocks - 1;

template <typename T, typename C, bool kNorm, bool kInterleaved, int kIndex>
__global__ void __launch_bounds__(kBackwardShapes[kIndex].threads, (kResidentBlocks<T, C, kIndex>))
    backward_kernel(const __grid_constant__ BackwardParams p) {
  wait_for_predecessor();
  release_successor();
  // The code stands here twice, so that what describes a side needs no registers.
  const uint32_t q_blocks = blocks_of_q(gridDim.x, p.q.heads, p.k.heads, 32 / kBackwardShapes[kIndex].group);
  if (blockIdx.x < q_blocks) {
    backward_heads<T, C, kNorm, kInterleaved, kIndex>(p, p.q, blockIdx.x, q_blocks);
  } else {
    backward_heads<T, C, kNorm, kInterleaved, kIndex>(p, p.k, blockIdx.x - q_blocks, gridDim.x - q_blocks);
  }
}

}  // namespace inlay::rope::cuda
