// Forward over rows that fit in registers: y = norm(x), norm(x + residual), or norm(x) gated.
//
// Maths: python/inlay/ops/norm.py. A group of threads holds one row; each thread holds `vectors` 16-byte vectors of it,
// `group` vectors apart so that neighbouring threads read neighbouring bytes. Two ways to walk the rows, each the
// faster one for its roles on an H200:
// * plain and residual: one row a group and many small blocks;
// * gated, where arithmetic must hide behind memory: a grid as large as fits on the chip, each thread copying its part
//   of the next row into shared memory in the background while this row is normalised.
// Everything is in T except the weight and bias, which are in W (T or float), and y, which type promotion may widen.
#pragma once

#include <type_traits>

#include "common/cuda/launch.cuh"
#include "common/cuda/pipeline.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vector.cuh"
#include "norm/cuda/config.h"
#include "norm/cuda/maths.cuh"
#include "norm/params.h"

namespace inlay::norm::cuda {

using namespace inlay::cuda;

template <Role kRole, int kIndex>
using ForwardBuffer =
    RowBuffer<2, forward_shapes<kRole>()[kIndex].vectors, forward_shapes<kRole>()[kIndex].threads, kStages>;  // x, gate

template <typename T, Role kRole, typename W, bool kStepwise, int kIndex>
__device__ __forceinline__ void forward_rows(const ForwardParams& p) {
  constexpr Shape kShape = forward_shapes<kRole>()[kIndex];
  constexpr int kGroup = kShape.group;
  constexpr int kVectors = kShape.vectors;
  constexpr int kLanes = kPerAccess<T>;
  using Y = std::conditional_t<kStepwise && kRole != Role::gated, W, T>;
  using Sum = GroupSum<kGroup, kShape.threads, 1>;
  __shared__ typename Sum::Scratch scratch;
  Sum group_sum(scratch);

  const int lane = threadIdx.x % kGroup;
  const int vectors = static_cast<int>(p.width) / kLanes;
  const float scale = sum_scale(p.kind, p.width);
  const float weight_offset = static_cast<float>(p.weight_offset);
  const bool plain_weight = p.weight.data && p.weight_offset == 0.0 && !p.bias.data;
  int64_t row = static_cast<int64_t>(blockIdx.x) * kShape.groups() + threadIdx.x / kGroup;
  // Threads past the last row or column take part in the sums with zeros.
  int own_vectors = row < p.rows ? vectors : 0;
  const auto owns = [&](int j) { return lane + j * kGroup < own_vectors; };

  Packed<T, kLanes> x[kVectors];
  Packed<T, kLanes> other[kRole == Role::plain ? 1 : kVectors];
  Packed<W, kLanes> weight[kVectors];
  const auto load_row = [&](const RowTensor& tensor, auto& target) {
    const T* const source = row_of<T>(tensor, row < p.rows ? row : 0);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (owns(j)) target[j] = load<T, kLanes>(source + (lane + j * kGroup) * kLanes);
    }
  };
  const auto load_weight = [&] {
    if (!p.weight.data) return;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (owns(j)) weight[j] = load<W, kLanes>(static_cast<const W*>(p.weight.data) + (lane + j * kGroup) * kLanes);
    }
  };

  const auto normalise_row = [&] {
    if constexpr (kRole == Role::residual) {  // from here on, x is the new residual
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (!owns(j)) continue;
        float sum[kLanes], r[kLanes];
        unpack(x[j], sum);
        unpack(other[j], r);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) sum[i] += r[i];
        x[j] = pack<T>(sum);
        store(static_cast<T*>(p.residual_out.data) + row * p.width + (lane + j * kGroup) * kLanes, x[j]);
      }
    }
    // What is normalised, of vector j. Converted again for each use: conversions are cheap, registers are not.
    const auto input = [&](int j, float (&u)[kLanes]) {
      keep_packed(x[j]);
      unpack(x[j], u);
      if constexpr (kRole == Role::gated) {
        if (p.gate_first) {
          float z[kLanes];
          unpack(other[j], z);
#pragma unroll
          for (int i = 0; i < kLanes; ++i) u[i] *= activate<T>(p.activation, z[i]);
        }
      }
    };

    float mean = 0.0f;
    float square_sum[1] = {0.0f};
    if (p.kind == Kind::layer) {
      float sum[1] = {0.0f};
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (!owns(j)) continue;
        float u[kLanes];
        input(j, u);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) sum[0] += u[i];
      }
      group_sum(sum);
      mean = sum[0] * scale;
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (!owns(j)) continue;
      float u[kLanes];
      input(j, u);
      if (p.kind == Kind::layer) {  // the variance from centred values: E[x^2] - E[x]^2 would cancel
#pragma unroll
        for (int i = 0; i < kLanes; ++i) u[i] -= mean;
      }
#pragma unroll
      for (int i = 0; i < kLanes; ++i) square_sum[0] += u[i] * u[i];
    }
    group_sum(square_sum);
    const float rstd = rsqrtf(square_sum[0] * scale + static_cast<float>(p.eps));
    if (lane == 0 && row < p.rows) {
      if (p.mean) static_cast<float*>(p.mean)[row] = mean;
      if (p.rstd) static_cast<float*>(p.rstd)[row] = rstd;
    }

#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (!owns(j)) continue;
      const int column = (lane + j * kGroup) * kLanes;
      float v[kLanes];
      input(j, v);
      normalise<T>(mean, rstd, v);
      if constexpr (kStepwise) {
        if constexpr (kRole != Role::gated && sizeof(W) == 2) {
          if (plain_weight) {  // one instruction multiplies and rounds two elements
            store(static_cast<Y*>(p.y.data) + row * p.width + column, multiply(pack<T>(v), weight[j]));
            continue;
          }
        }
        round_all<T>(v);
      }
      if (p.weight.data) {
        float w[kLanes];
        unpack(weight[j], w);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) v[i] *= w[i] + weight_offset;
        if constexpr (kStepwise) round_all<W>(v);
      }
      if (p.bias.data) {
        float b[kLanes];
        unpack(load<W, kLanes>(static_cast<const W*>(p.bias.data) + column), b);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) v[i] += b[i];
        if constexpr (kStepwise) round_all<W>(v);
      }
      if constexpr (kRole == Role::gated) {
        if (!p.gate_first) {
          float z[kLanes];
          unpack(other[j], z);
#pragma unroll
          for (int i = 0; i < kLanes; ++i) v[i] *= activate<T>(p.activation, z[i]);
        }
      }
      store(static_cast<Y*>(p.y.data) + row * p.width + column, pack<Y>(v));
    }
  };

  if constexpr (kRole != Role::gated) {
    load_row(p.x, x);  // all loads before the first use
    if constexpr (kRole == Role::residual) load_row(p.residual, other);
    load_weight();
    normalise_row();
  } else {
    extern __shared__ uint4 dynamic_shared[];
    auto& buffer = *reinterpret_cast<ForwardBuffer<kRole, kIndex>*>(dynamic_shared);
    const int64_t row_step = static_cast<int64_t>(gridDim.x) * kShape.groups();
    const auto fetch = [&](int stage, int64_t next) {
      if (next < p.rows) {
        buffer.template fetch<T>(stage, 0, row_of<T>(p.x, next), lane, kGroup, vectors);
        buffer.template fetch<T>(stage, 1, row_of<T>(p.gate, next), lane, kGroup, vectors);
      }
      commit_copies();
    };
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage, row + stage * row_step);
    own_vectors = vectors;
    load_weight();
    // All groups of a block take as many turns, the last ones perhaps without a row: shuffles need whole warps.
    const int64_t lag = threadIdx.x / kGroup;
    for (int stage = 0; row - lag < p.rows; row += row_step, stage = stage + 1 == kStages ? 0 : stage + 1) {
      fetch(stage == 0 ? kStages - 1 : stage - 1, row + (kStages - 1) * row_step);
      wait_for_copies<kStages - 1>();
      own_vectors = row < p.rows ? vectors : 0;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        x[j] = buffer.template read<T>(stage, 0, j);
        other[j] = buffer.template read<T>(stage, 1, j);
      }
      normalise_row();
    }
  }
}

template <typename T, Role kRole, int kIndex>
__global__ void __launch_bounds__(forward_shapes<kRole>()[kIndex].threads, forward_shapes<kRole>()[kIndex].blocks)
    forward_kernel(const __grid_constant__ ForwardParams p) {
  // Only blocks that can have started before their predecessor ended: for the others it would be work twice.
  if (blockIdx.x < resident_blocks_bound(blockDim.x)) {
    constexpr Shape kShape = forward_shapes<kRole>()[kIndex];
    prefetch_row<T>(p.x, p, kShape);
    if constexpr (kRole == Role::residual) prefetch_row<T>(p.residual, p, kShape);
    if constexpr (kRole == Role::gated) prefetch_row<T>(p.gate, p, kShape);
  }
  wait_for_predecessor();
  release_successor();
  // Once for each dtype of the weight and each rounding, so that neither branches per element.
  const bool wide = p.weight.data ? p.weight.dtype == DType::f32 : p.bias.data && p.bias.dtype == DType::f32;
  if (p.rounding == Rounding::stepwise) {
    wide ? forward_rows<T, kRole, float, true, kIndex>(p) : forward_rows<T, kRole, T, true, kIndex>(p);
  } else {
    wide ? forward_rows<T, kRole, float, false, kIndex>(p) : forward_rows<T, kRole, T, false, kIndex>(p);
  }
}

}  // namespace inlay::norm::cuda
