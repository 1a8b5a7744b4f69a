// Forward over rows that fit in registers: y = norm(x), norm(x + residual), or norm(x) gated.
//
// Maths: python/inlay/ops/norm.py. A group of threads holds one row; each thread holds `vectors` 16-byte vectors of it,
// `group` vectors apart so that neighbouring threads read neighbouring bytes. One row a group and many small blocks: on
// an H200 that beat a resident grid that walks the rows through a pipeline, for plain norms and with a residual. For
// the gated norm the resident grid was the faster one when last compared; it deserves another try. Everything is in T
// except the weight and bias, which are in W (T or float), and y, which type promotion may widen.
#pragma once

#include <type_traits>

#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vector.cuh"
#include "norm/cuda/config.h"
#include "norm/cuda/maths.cuh"
#include "norm/params.h"

namespace inlay::norm::cuda {

using namespace inlay::cuda;

template <typename T, Role kRole, typename W, bool kStepwise, int kIndex>
__device__ inline void forward_row(const ForwardParams& p) {
  constexpr Shape kShape = kForwardShapes[kIndex];
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
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kShape.rows_per_block() + threadIdx.x / kGroup;
  // Threads past the last row or column take part in the sums with zeros.
  const int own_vectors = row < p.rows ? vectors : 0;
  const auto owns = [&](int j) { return lane + j * kGroup < own_vectors; };

  // All loads before the first use.
  Packed<T, kLanes> x[kVectors];
  Packed<T, kLanes> other[kRole == Role::plain ? 1 : kVectors];
  Packed<W, kLanes> weight[kVectors];
  const auto load_rows = [&](const RowTensor& tensor, auto& target) {
    const T* const source = static_cast<const T*>(tensor.data) + (row < p.rows ? tensor.layout.offset(row) : 0);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (owns(j)) target[j] = load<T, kLanes>(source + (lane + j * kGroup) * kLanes);
    }
  };
  load_rows(p.x, x);
  if constexpr (kRole == Role::residual) load_rows(p.residual, other);
  if constexpr (kRole == Role::gated) load_rows(p.gate, other);
  if (p.weight.data) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (owns(j)) weight[j] = load<W, kLanes>(static_cast<const W*>(p.weight.data) + (lane + j * kGroup) * kLanes);
    }
  }

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
  const bool plain_weight = p.weight.data && p.weight_offset == 0.0 && !p.bias.data;
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
}

template <typename T, Role kRole, int kIndex>
__global__ void __launch_bounds__(kForwardShapes[kIndex].threads,
                                  kRole == Role::plain ? kForwardShapes[kIndex].blocks : 1)
    forward_kernel(const __grid_constant__ ForwardParams p) {
  wait_for_predecessor();
  release_successor();
  // Once for each dtype of the weight and each rounding, so that neither branches per element.
  const bool wide = p.weight.data ? p.weight.dtype == DType::f32 : p.bias.data && p.bias.dtype == DType::f32;
  if (p.rounding == Rounding::stepwise) {
    wide ? forward_row<T, kRole, float, true, kIndex>(p) : forward_row<T, kRole, T, true, kIndex>(p);
  } else {
    wide ? forward_row<T, kRole, float, false, kIndex>(p) : forward_row<T, kRole, T, false, kIndex>(p);
  }
}

}  // namespace inlay::norm::cuda
