// Forward over heads that fit in registers. Maths: python/inlay/ops/rope.py.
//
// A warp works on one token and several of its queries or keys, a group of threads on every so many'th of these heads.
// All loads of a thread are under way before the first is used. launch.h says what the forms compute in.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vector.cuh"
#include "rope/cuda/config.h"
#include "rope/cuda/launch.h"
#include "rope/cuda/maths.cuh"
#include "rope/params.h"

namespace inlay::rope::cuda {

using namespace inlay::cuda;

template <typename T, bool kNorm, bool kInterleaved, Form kForm, int kIndex>
__global__ void __launch_bounds__(kForwardShapes[kIndex].threads, kForwardShapes[kIndex].blocks)
    forward_kernel(const __grid_constant__ ForwardParams p) {
  constexpr Shape kShape = kForwardShapes[kIndex];
  constexpr int kHeads = kShape.heads;
  constexpr int kLanes = kPerAccess<T>;
  constexpr int kGroups = 32 / kShape.group;  // of a warp
  // All counts are below 2^31: see launch.cu.
  const uint32_t q_warps = kShape.warps_for(static_cast<uint32_t>(p.q.heads));
  const uint32_t warps = q_warps + kShape.warps_for(static_cast<uint32_t>(p.k.heads));
  const uint32_t tokens = static_cast<uint32_t>(p.tokens);
  const uint32_t warp = blockIdx.x * kShape.warps() + threadIdx.x / 32;
  const uint32_t row = warp / warps;  // of all tokens
  const uint32_t part = warp - row * warps;
  const uint32_t batch = row / tokens;
  const uint32_t token = row - batch * tokens;
  const bool in_range = batch < p.batch;
  const bool of_q = part < q_warps;
  const ForwardSide side = of_q ? p.q : p.k;
  const int first_head = (of_q ? part : part - q_warps) * kShape.heads_of_warp() + threadIdx.x % 32 / kShape.group;
  const Share<T, kShape.group, kInterleaved> share(p);
  // How many of its heads a thread has something of.
  const int heads_left = (static_cast<int>(side.heads) - first_head + kGroups - 1) / kGroups;
  const int count = in_range && share.owns ? heads_left : 0;
  const T* const source =
      static_cast<const T*>(side.x.data) + side.x.offset(batch, token, first_head) + share.channel[0];
  const int64_t pitch = kGroups * side.x.head_stride;
  const int second = share.channel[1] - share.channel[0];

  // Only blocks that can have started before their predecessor ended: for the others it would be work twice.
  if (blockIdx.x < resident_blocks_bound(blockDim.x)) {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (i >= count) break;
      prefetch_to_l2(source + i * pitch);
      prefetch_to_l2(source + i * pitch + second);
    }
  }
  wait_for_predecessor();
  release_successor();
  if (!in_range) return;

  Packed<T, kLanes> x[kHeads][2];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (i < count) {
      x[i][0] = load<T, kLanes>(source + i * pitch);
      x[i][1] = load<T, kLanes>(source + i * pitch + second);
    }
  }
  Angles<T, kLanes, kInterleaved> angles;
  Angles<float, kLanes, kInterleaved> wide_angles;
  if (kForm != Form::wide || p.angles != DType::f32) {
    angles.load(p, share, batch, token);
    angles.negate_first();
    if constexpr (kForm == Form::wide) angles.widen_to(wide_angles);
  } else {
    wide_angles.load(p, share, batch, token);
    wide_angles.negate_first();
  }
  Packed<T, kLanes> packed_weights[2];
  float weights[2][kLanes];
  float rstd[kHeads] = {};
  if constexpr (kNorm) {
    if constexpr (kForm == Form::stepwise) {
      const T* const data = static_cast<const T*>(side.weight.data);
      if (share.owns) {
        packed_weights[0] = load<T, kLanes>(data + share.channel[0]);
        packed_weights[1] = load<T, kLanes>(data + share.channel[1]);
      }
    } else {
      load_weights(p, side.weight, share, weights);
    }
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (i >= count) break;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float v[kLanes];
        widen(x[i][j], v);
#pragma unroll
        for (int l = 0; l < kLanes; ++l) rstd[i] += v[l] * v[l];
      }
    }
    using Sum = GroupSum<kShape.group, kShape.threads, kHeads>;
    __shared__ typename Sum::Scratch scratch;
    Sum{scratch}(rstd);
    const float scale = 1.0f / static_cast<float>(p.width);
#pragma unroll
    for (int i = 0; i < kHeads; ++i) rstd[i] = rsqrtf(rstd[i] * scale + static_cast<float>(p.eps));
  }

  T* target = static_cast<T*>(side.y.data) + (row * side.heads + first_head) * p.width + share.channel[0];
#pragma unroll
  for (int i = 0; i < kHeads; ++i, target += kGroups * p.width) {
    if (i >= count) break;
    const auto normalise = [&](int j, float (&v)[kLanes]) {
      keep_packed(x[i][j]);
      widen(x[i][j], v);
      if constexpr (kNorm) {
#pragma unroll
        for (int l = 0; l < kLanes; ++l) v[l] *= rstd[i];
      }
    };
    const auto weigh = [&](int j, float (&v)[kLanes]) {
      if constexpr (kNorm) {
        if (side.rounds_normalised) round_all<T>(v);
#pragma unroll
        for (int l = 0; l < kLanes; ++l) v[l] *= weights[j][l];
      }
    };
    Packed<T, kLanes> y[2];
    if constexpr (kForm != Form::wide) {
      Packed<T, kLanes> m[2] = {x[i][0], x[i][1]};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if constexpr (kNorm) {
          float v[kLanes];
          normalise(j, v);
          if constexpr (kForm == Form::stepwise) {
            m[j] = multiply(pack<T>(v), packed_weights[j]);
          } else {
            weigh(j, v);
            m[j] = pack<T>(v);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        y[j] = m[j];
        if (!share.rotates[j]) continue;
        const Packed<T, kLanes> partner = kInterleaved ? swap_pairs(m[j]) : m[1 - j];
        y[j] = add(multiply(m[j], angles.cos[j]), multiply(partner, angles.sin[j]));
      }
    } else {
      float m[2][kLanes];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        normalise(j, m[j]);
        weigh(j, m[j]);
        if (kNorm && side.rounds_weighted) round_all<T>(m[j]);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float v[kLanes];
#pragma unroll
        for (int l = 0; l < kLanes; ++l) {
          const float partner = kInterleaved ? m[j][l ^ 1] : m[1 - j][l];
          const float rotated = m[j][l] * wide_angles.cos[j].values[l] + partner * wide_angles.sin[j].values[l];
          v[l] = share.rotates[j] ? rotated : m[j][l];
        }
        y[j] = pack<T>(v);
      }
    }
    store_global(target, y[0]);
    store_global(target + second, y[1]);
  }
}

}  // namespace inlay::rope::cuda
