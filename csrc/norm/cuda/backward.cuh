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

// A thread's part of the rows under way, [stage][tensor][vector], strided by the block so that banks do not conflict.
// Nobody else reads it, so the pipeline needs no barrier.
template <int kTensors, int kVectors, int kThreads, int kStages>
struct RowBuffer {
  uint4 parts[kStages][kTensors][kVectors][kThreads];

  // Copies this thread's vectors of a row of `tensor` in the background.
  template <typename T>
  __device__ void fetch(int stage, int tensor, const T* row, int lane, int group, int vectors) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int vector = lane + j * group;
      if (vector < vectors) {
        copy_async<16>(&parts[stage][tensor][j][threadIdx.x], row + vector * kPerAccess<T>);
      }
    }
  }

  template <typename T>
  __device__ void read(int stage, int tensor, int j, float (&values)[kPerAccess<T>]) const {
    unpack(*reinterpret_cast<const Packed<T, kPerAccess<T>>*>(&parts[stage][tensor][j][threadIdx.x]), values);
  }
};

template <Role kRole, int kIndex>
struct BackwardBuffer {
  static constexpr Shape kShape = kBackwardShapes[kIndex];
  RowBuffer<kRole == Role::plain ? 2 : 3, kShape.vectors, kShape.threads, kBackwardStages> rows;  // x, dy, other
  float rstd[kBackwardStages][kShape.threads];
  float mean[kBackwardStages][kShape.threads];
};

template <typename T, Role kRole, bool kBias, int kIndex>
__global__ void __launch_bounds__(kBackwardShapes[kIndex].threads, kBackwardShapes[kIndex].blocks)
    backward_kernel(const __grid_constant__ BackwardParams p) {
  constexpr Shape kShape = kBackwardShapes[kIndex];
  constexpr int kGroup = kShape.group;
  constexpr int kVectors = kShape.vectors;
  constexpr int kStages = kBackwardStages;
  constexpr int kLanes = kPerAccess<T>;
  constexpr int kRowsPerBlock = kShape.rows_per_block();
  union alignas(16) Shared {
    typename GroupSum<kGroup, kShape.threads, 2>::Scratch sums;
    float columns[kRowsPerBlock > 1 ? kShape.threads : 1][kLanes];
  };
  __shared__ Shared shared;
  extern __shared__ uint4 dynamic_shared[];
  auto& buffer = *reinterpret_cast<BackwardBuffer<kRole, kIndex>*>(dynamic_shared);
  GroupSum<kGroup, kShape.threads, 2> group_sum(shared.sums);

  const int lane = threadIdx.x % kGroup;
  const int vectors = static_cast<int>(p.width) / kLanes;
  const int64_t row_step = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  const float scale = sum_scale(p.kind, p.width);
  const RowTensor& other = kRole == Role::gated ? p.gate : p.dresidual_out;
  const bool gate_first = kRole == Role::gated && p.gate_first;

  const auto fetch_tensor = [&](int stage, int index, const RowTensor& tensor, int64_t row) {
    buffer.rows.fetch(stage, index, static_cast<const T*>(tensor.data) + tensor.layout.offset(row), lane, kGroup,
                      vectors);
  };
  const auto fetch = [&](int stage, int64_t row) {
    if (row < p.rows) {
      fetch_tensor(stage, 0, p.x, row);
      fetch_tensor(stage, 1, p.dy, row);
      if constexpr (kRole != Role::plain) fetch_tensor(stage, 2, other, row);
      copy_async<4>(&buffer.rstd[stage][threadIdx.x], static_cast<const float*>(p.rstd) + row);
      if (p.kind == Kind::layer) {
        copy_async<4>(&buffer.mean[stage][threadIdx.x], static_cast<const float*>(p.mean) + row);
      }
    }
    commit_copies();
  };

  wait_for_predecessor();
  release_successor();
  int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kGroup;
  // Shuffles need whole warps: the loop below ends when the warp's first row does.
  const int64_t lag = kGroup < 32 ? (threadIdx.x % 32) / kGroup : 0;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage, row + stage * row_step);

  float weight[kVectors][kLanes];  // with the offset
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) weight[j][i] = 1.0f;
    const int vector = lane + j * kGroup;
    if (p.weight.data && vector < vectors) {
      load_as_float(p.weight.data, p.weight.dtype, vector * kLanes, weight[j]);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) weight[j][i] += static_cast<float>(p.weight_offset);
    }
  }
  float dweight[kVectors][kLanes] = {};
  float dbias[kBias ? kVectors : 1][kLanes] = {};

  for (int stage = 0; row - lag < p.rows; row += row_step, stage = stage + 1 == kStages ? 0 : stage + 1) {
    fetch(stage == 0 ? kStages - 1 : stage - 1, row + (kStages - 1) * row_step);
    wait_for_copies<kStages - 1>();
    const bool valid = row < p.rows;
    const float rstd = buffer.rstd[stage][threadIdx.x];
    const float mean = p.kind == Kind::layer ? buffer.mean[stage][threadIdx.x] : 0.0f;

    float n[kVectors][kLanes];
    float g[kVectors][kLanes];
    float sums[2] = {0.0f, 0.0f};  // of g * n and of g
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int vector = lane + j * kGroup;
      if (vector >= vectors || !valid) continue;
      buffer.rows.template read<T>(stage, 0, j, n[j]);
      buffer.rows.template read<T>(stage, 1, j, g[j]);
      float z[kLanes];
      if constexpr (kRole == Role::gated) {
        buffer.rows.template read<T>(stage, 2, j, z);
        if (gate_first) {
#pragma unroll
          for (int i = 0; i < kLanes; ++i) n[j][i] *= activate<T>(p.activation, z[i]);
        }
      }
      normalise<T>(mean, rstd, n[j]);
      if constexpr (kRole == Role::gated) {
        if (!gate_first) {
          float dz[kLanes];
          float b[kLanes] = {};
          if (p.bias.data) load_as_float(p.bias.data, p.bias.dtype, vector * kLanes, b);
#pragma unroll
          for (int i = 0; i < kLanes; ++i) {
            const Gate gate = activate_with_derivative<T>(p.activation, z[i]);
            dz[i] = g[j][i] * (n[j][i] * weight[j][i] + b[i]) * gate.derivative;
            g[j][i] *= gate.value;
          }
          store(static_cast<T*>(p.dgate.data) + row * p.width + vector * kLanes, pack<T>(dz));
        }
      }
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        dweight[j][i] += g[j][i] * n[j][i];
        if constexpr (kBias) dbias[j][i] += g[j][i];
        g[j][i] *= weight[j][i];
        sums[0] += g[j][i] * n[j][i];
      }
      if (p.kind == Kind::layer) {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) sums[1] += g[j][i];
      }
    }
    float mean_g = 0.0f;
    if (p.kind == Kind::layer) {
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
        buffer.rows.template read<T>(stage, 2, j, h);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) dx[i] += h[i];
      }
      if constexpr (kRole == Role::gated) {
        if (gate_first) {
          float x[kLanes], z[kLanes], dz[kLanes];
          buffer.rows.template read<T>(stage, 0, j, x);
          buffer.rows.template read<T>(stage, 2, j, z);
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

  // One row of `partials` a block.
  const auto write_sums = [&](const float (&sums)[kVectors][kLanes], float* target) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int vector = lane + j * kGroup;
      float total[kLanes];
#pragma unroll
      for (int i = 0; i < kLanes; ++i) total[i] = sums[j][i];
      if constexpr (kRowsPerBlock > 1) {
        __syncthreads();  // the columns of the previous vector have been read
        store(shared.columns[threadIdx.x], pack<float>(total));
        __syncthreads();
        if (threadIdx.x >= kGroup) continue;
#pragma unroll
        for (int i = 0; i < kLanes; ++i) total[i] = 0.0f;
        for (int group = 0; group < kRowsPerBlock; ++group) {
#pragma unroll
          for (int i = 0; i < kLanes; ++i) total[i] += shared.columns[group * kGroup + lane][i];
        }
      }
      if (vector < vectors) store(target + vector * kLanes, pack<float>(total));
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

}  // namespace inlay::norm::cuda
