// Backward over rows that fit in registers: dx (plus the residual's gradient), dgate, and partial sums of dweight,
// dbias.
//
// With n = (u - mean) * rstd, g = dn * (weight + offset), <.> the mean over a row (the sum for l2), dn the gradient of
// n * weight + bias:
//   du = rstd * (g - n * <g n> - <g>)      the last term for LayerNorm only
//   dweight = sum over rows of dn * n,  dbias = sum over rows of dn
// and the gate's product rule before or after. Each thread keeps its columns' sums in float32 registers over all rows
// of its block; the block adds its groups in order, writes one row of `partials`, and sum_partials adds those in order:
// the same bits every run. The grid is as large as fits on the chip and walks the rows; each thread copies its part of
// the next row into shared memory in the background while this row is reduced.
#pragma once

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
using BackwardBuffer = RowBuffer<kRole == Role::plain ? 2 : 3, kBackwardShapes[kIndex].vectors,  // x, dy, other
                                 kBackwardShapes[kIndex].threads, kStages>;

template <typename T, Role kRole, typename W, bool kBias, int kIndex>
__device__ __forceinline__ void backward_rows(const BackwardParams& p) {
  constexpr Shape kShape = kBackwardShapes[kIndex];
  constexpr int kGroup = kShape.group;
  constexpr int kVectors = kShape.vectors;
  constexpr int kLanes = kPerAccess<T>;
  using Sum = GroupSum<kGroup, kShape.threads, 2>;
  __shared__ typename Sum::Scratch scratch;
  extern __shared__ uint4 dynamic_shared[];
  auto& buffer = *reinterpret_cast<BackwardBuffer<kRole, kIndex>*>(dynamic_shared);
  Sum group_sum(scratch);

  const int lane = threadIdx.x % kGroup;
  const int vectors = static_cast<int>(p.width) / kLanes;
  const int64_t row_step = static_cast<int64_t>(gridDim.x) * kShape.groups();
  const float scale = sum_scale(p.kind, p.width);
  const float weight_offset = static_cast<float>(p.weight_offset);
  const float* const rstds = static_cast<const float*>(p.rstd);
  const float* const means = static_cast<const float*>(p.mean);
  const RowTensor& other = kRole == Role::gated ? p.gate : p.dresidual_out;
  const bool is_layer = p.kind == Kind::layer;
  const bool gate_first = kRole == Role::gated && p.gate_first;

  const auto fetch_tensor = [&](int stage, int index, const RowTensor& tensor, int64_t row) {
    buffer.template fetch<T>(stage, index, row_of<T>(tensor, row), lane, kGroup, vectors);
  };
  const auto fetch = [&](int stage, int64_t row) {
    if (row < p.rows) {
      fetch_tensor(stage, 0, p.x, row);
      fetch_tensor(stage, 1, p.dy, row);
      if constexpr (kRole != Role::plain) fetch_tensor(stage, 2, other, row);
    }
    commit_copies();
  };

  int64_t row = static_cast<int64_t>(blockIdx.x) * kShape.groups() + threadIdx.x / kGroup;
  // All groups of a block take as many turns, the last ones perhaps without a row: shuffles need whole warps.
  const int64_t lag = threadIdx.x / kGroup;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage, row + stage * row_step);
  float next_rstd = row < p.rows ? rstds[row] : 0.0f;
  float next_mean = is_layer && row < p.rows ? means[row] : 0.0f;

  // Weights wider than T would take twice the registers: those are read from the cache each time.
  constexpr bool kHoldWeight = sizeof(W) == sizeof(T);
  Packed<W, kLanes> weight[kHoldWeight ? kVectors : 1];
  const auto load_weight = [&](int j) {
    return load<W, kLanes>(static_cast<const W*>(p.weight.data) + (lane + j * kGroup) * kLanes);
  };
  if (kHoldWeight && p.weight.data) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (lane + j * kGroup < vectors) weight[j] = load_weight(j);
    }
  }
  const auto weights = [&](int j, float (&w)[kLanes]) {
    if (!p.weight.data) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) w[i] = 1.0f;
      return;
    }
    if constexpr (kHoldWeight) {
      keep_packed(weight[j]);
      unpack(weight[j], w);
    } else {
      unpack(load_weight(j), w);
    }
#pragma unroll
    for (int i = 0; i < kLanes; ++i) w[i] += weight_offset;
  };
  float dweight[kVectors][kLanes] = {};
  float dbias[kBias ? kVectors : 1][kLanes] = {};

  for (int stage = 0; row - lag < p.rows; row += row_step, stage = stage + 1 == kStages ? 0 : stage + 1) {
    const bool valid = row < p.rows;
    const float rstd = next_rstd;
    const float mean = next_mean;
    fetch(stage == 0 ? kStages - 1 : stage - 1, row + (kStages - 1) * row_step);
    if (row + row_step < p.rows) {
      next_rstd = rstds[row + row_step];
      if (is_layer) next_mean = means[row + row_step];
    }
    wait_for_copies<kStages - 1>();

    float n[kVectors][kLanes];
    float g[kVectors][kLanes];
    float sums[2] = {0.0f, 0.0f};  // of g * n and of g
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (lane + j * kGroup >= vectors || !valid) continue;
      float w[kLanes];
      weights(j, w);
      unpack(buffer.template read<T>(stage, 0, j), n[j]);
      unpack(buffer.template read<T>(stage, 1, j), g[j]);
      float z[kLanes];
      if constexpr (kRole == Role::gated) {
        unpack(buffer.template read<T>(stage, 2, j), z);
        if (gate_first) {
#pragma unroll
          for (int i = 0; i < kLanes; ++i) n[j][i] *= activate<T>(p.activation, z[i]);
        }
      }
      normalise<T>(mean, rstd, n[j]);
      if constexpr (kRole == Role::gated) {
        if (!gate_first) {
          const int column = (lane + j * kGroup) * kLanes;
          float dz[kLanes];
          float b[kLanes] = {};
          if (p.bias.data) load_as_float(p.bias.data, p.bias.dtype, column, b);
#pragma unroll
          for (int i = 0; i < kLanes; ++i) {
            const Gate gate = activate_with_derivative<T>(p.activation, z[i]);
            dz[i] = g[j][i] * (n[j][i] * w[i] + b[i]) * gate.derivative;
            g[j][i] *= gate.value;
          }
          store(static_cast<T*>(p.dgate.data) + row * p.width + column, pack<T>(dz));
        }
      }
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        dweight[j][i] += g[j][i] * n[j][i];
        if constexpr (kBias) dbias[j][i] += g[j][i];
        g[j][i] *= w[i];
        sums[0] += g[j][i] * n[j][i];
      }
      if (is_layer) {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) sums[1] += g[j][i];
      }
    }
    float mean_g = 0.0f;
    if (is_layer) {
      group_sum(sums);
      mean_g = sums[1] * scale;
    } else {
      float dot_alone[1] = {sums[0]};
      group_sum(dot_alone);
      sums[0] = dot_alone[0];
    }
    if (!valid) continue;
    const float scaled_dot = -sums[0] * scale * rstd;
    const float scaled_mean = -mean_g * rstd;

#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int vector = lane + j * kGroup;
      if (vector >= vectors) continue;
      const int64_t position = row * p.width + vector * kLanes;
      float dx[kLanes];
#pragma unroll
      for (int i = 0; i < kLanes; ++i) dx[i] = g[j][i] * rstd + (n[j][i] * scaled_dot + scaled_mean);
      if constexpr (kRole == Role::residual) {
        float h[kLanes];
        unpack(buffer.template read<T>(stage, 2, j), h);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) dx[i] += h[i];
      }
      if constexpr (kRole == Role::gated) {
        if (gate_first) {
          float x[kLanes], z[kLanes], dz[kLanes];
          unpack(buffer.template read<T>(stage, 0, j), x);
          unpack(buffer.template read<T>(stage, 2, j), z);
#pragma unroll
          for (int i = 0; i < kLanes; ++i) {
            const Gate gate = activate_with_derivative<T>(p.activation, z[i]);
            dz[i] = dx[i] * x[i] * gate.derivative;
            dx[i] *= gate.value;
          }
          store(static_cast<T*>(p.dgate.data) + position, pack<T>(dz));
        }
      }
      store(static_cast<T*>(p.dx.data) + position, pack<T>(dx));
    }
  }

  // One row of `partials` a block: its groups' sums, added in order. The row buffers are free by now.
  const auto write_sums = [&](const float (&sums)[kVectors][kLanes], float* target) {
    constexpr int kWidest = kShape.max_vectors * kLanes;
    float* const columns = reinterpret_cast<float*>(dynamic_shared);
    static_assert(sizeof(buffer) >= kShape.groups() * kWidest * sizeof(float));
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      float* const own = columns + threadIdx.x / kGroup * kWidest + (lane + j * kGroup) * kLanes;
#pragma unroll
      for (int i = 0; i < kLanes; i += 4) {
        *reinterpret_cast<float4*>(own + i) = {sums[j][i], sums[j][i + 1], sums[j][i + 2], sums[j][i + 3]};
      }
    }
    __syncthreads();
    for (int column = threadIdx.x * 4; column < p.width; column += kShape.threads * 4) {
      float4 total = *reinterpret_cast<const float4*>(columns + column);
#pragma unroll
      for (int group = 1; group < kShape.groups(); ++group) {
        const float4 part = *reinterpret_cast<const float4*>(columns + group * kWidest + column);
        total = {total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w};
      }
      *reinterpret_cast<float4*>(target + column) = total;
    }
  };
  if (p.partials) {
    const int wanted = (p.dweight.data != nullptr) + (p.dbias.data != nullptr);
    float* target = static_cast<float*>(p.partials) + static_cast<int64_t>(blockIdx.x) * wanted * p.width;
    if (p.dweight.data) {
      write_sums(dweight, target);
      target += p.width;
    }
    if constexpr (kBias) {
      if (p.dbias.data) write_sums(dbias, target);
    }
  }
}

template <typename T, Role kRole, bool kBias, int kIndex>
__global__ void __launch_bounds__(kBackwardShapes[kIndex].threads, kBackwardShapes[kIndex].blocks)
    backward_kernel(const __grid_constant__ BackwardParams p) {
  constexpr Shape kShape = kBackwardShapes[kIndex];
  prefetch_row<T>(p.x, p, kShape);
  prefetch_row<T>(p.dy, p, kShape);
  wait_for_predecessor();
  release_successor();
  const bool wide = p.weight.data && p.weight.dtype == DType::f32;
  wide ? backward_rows<T, kRole, float, kBias, kIndex>(p) : backward_rows<T, kRole, T, kBias, kIndex>(p);
}

}  // namespace inlay::norm::cuda
