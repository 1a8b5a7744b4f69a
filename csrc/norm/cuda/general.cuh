// Forward and backward for what the register kernels leave: rows of any width, alignment and mixture of dtypes.
//
// Same maths. A row is read once for each pass over it (from L1 or L2 after the first); every tensor carries its own
// dtype; kLanes is 1 for odd widths and unaligned rows, else a 16-byte access of the narrowest dtype. The sums over
// rows are kept in the block's row of `partials` itself: each column belongs to one thread of each group, and where a
// block has several groups, each adds to it in turn.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vector.cuh"
#include "norm/cuda/maths.cuh"
#include "norm/params.h"

namespace inlay::norm::cuda {

using namespace inlay::cuda;

inline constexpr int kGeneralThreads = 256;

template <int kLanes>
__device__ inline void load_row_values(const RowTensor& tensor, int64_t row, int64_t column, float (&values)[kLanes]) {
  load_as_float(tensor.data, tensor.dtype, tensor.layout.offset(row) + column, values);
}

template <int kLanes>
__device__ inline void round_all(DType dtype, float (&values)[kLanes]) {
  if (dtype == DType::bf16) inlay::cuda::round_all<__nv_bfloat16>(values);
  if (dtype == DType::f16) inlay::cuda::round_all<__half>(values);
}

// (weight + offset) of some columns, ones without a weight
template <int kLanes>
__device__ inline void load_scale(const VectorTensor& weight, double offset, int64_t column, float (&w)[kLanes]) {
  if (!weight.data) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) w[i] = 1.0f;
    return;
  }
  load_as_float(weight.data, weight.dtype, column, w);
#pragma unroll
  for (int i = 0; i < kLanes; ++i) w[i] += static_cast<float>(offset);
}

template <int kLanes, int kGroup>
__global__ void __launch_bounds__(kGeneralThreads) forward_general_kernel(const __grid_constant__ ForwardParams p) {
  constexpr int kRowsPerBlock = kGeneralThreads / kGroup;
  using Sum = GroupSum<kGroup, kGeneralThreads, 1>;
  __shared__ typename Sum::Scratch scratch;
  Sum group_sum(scratch);
  const int64_t first_column = static_cast<int64_t>(threadIdx.x % kGroup) * kLanes;
  constexpr int64_t kColumnStep = kGroup * kLanes;
  const float scale = sum_scale(p.kind, p.width);
  const bool stepwise = p.rounding == Rounding::stepwise;
  const DType after_weight = p.weight.data && p.weight.dtype != p.x.dtype ? DType::f32 : p.x.dtype;
  const DType after_bias = p.bias.data && p.bias.dtype != after_weight ? DType::f32 : after_weight;

  // What is normalised. The first pass also writes the new residual.
  const auto load_input = [&](int64_t row, int64_t column, float (&u)[kLanes], bool first_pass) {
    load_row_values(p.x, row, column, u);
    float other[kLanes];
    if (p.residual.data) {
      load_row_values(p.residual, row, column, other);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) u[i] += other[i];
      if (first_pass) store_from_float(p.residual_out.data, p.residual_out.dtype, row * p.width + column, u);
      round_all(p.residual_out.dtype, u);
    }
    if (p.gate.data && p.gate_first) {
      load_row_values(p.gate, row, column, other);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) u[i] *= activate<float>(p.activation, other[i]);
    }
  };

  wait_for_predecessor();
  release_successor();
  const int64_t row_step = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kGroup; row < p.rows;
       row += row_step) {
    float mean = 0.0f;
    if (p.kind == Kind::layer) {
      float sum[1] = {0.0f};
      for (int64_t column = first_column; column < p.width; column += kColumnStep) {
        float u[kLanes];
        load_input(row, column, u, false);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) sum[0] += u[i];
      }
      group_sum(sum);
      mean = sum[0] * scale;
    }
    float square_sum[1] = {0.0f};
    for (int64_t column = first_column; column < p.width; column += kColumnStep) {
      float u[kLanes];
      load_input(row, column, u, true);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) square_sum[0] += (u[i] - mean) * (u[i] - mean);
    }
    group_sum(square_sum);
    const float rstd = rsqrtf(square_sum[0] * scale + static_cast<float>(p.eps));
    if (first_column == 0) {
      if (p.mean) static_cast<float*>(p.mean)[row] = mean;
      if (p.rstd) static_cast<float*>(p.rstd)[row] = rstd;
    }
    for (int64_t column = first_column; column < p.width; column += kColumnStep) {
      float v[kLanes];
      load_input(row, column, v, false);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) v[i] = (v[i] - mean) * rstd;
      if (stepwise) round_all(p.x.dtype, v);
      if (p.weight.data) {
        float w[kLanes];
        load_scale(p.weight, p.weight_offset, column, w);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) v[i] *= w[i];
        if (stepwise) round_all(after_weight, v);
      }
      if (p.bias.data) {
        float b[kLanes];
        load_as_float(p.bias.data, p.bias.dtype, column, b);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) v[i] += b[i];
        if (stepwise) round_all(after_bias, v);
      }
      if (p.gate.data && !p.gate_first) {
        float z[kLanes];
        load_row_values(p.gate, row, column, z);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) v[i] *= activate<float>(p.activation, z[i]);
      }
      store_from_float(p.y.data, p.y.dtype, row * p.width + column, v);
    }
  }
}

template <int kLanes, int kGroup>
__global__ void __launch_bounds__(kGeneralThreads) backward_general_kernel(const __grid_constant__ BackwardParams p) {
  constexpr int kRowsPerBlock = kGeneralThreads / kGroup;
  using Sum = GroupSum<kGroup, kGeneralThreads, 2>;
  __shared__ typename Sum::Scratch scratch;
  Sum group_sum(scratch);
  const int group = threadIdx.x / kGroup;
  const int64_t first_column = static_cast<int64_t>(threadIdx.x % kGroup) * kLanes;
  constexpr int64_t kColumnStep = kGroup * kLanes;
  const float scale = sum_scale(p.kind, p.width);

  wait_for_predecessor();
  release_successor();
  float* dweight = nullptr;
  float* dbias = nullptr;
  if (p.partials) {
    const int wanted = (p.dweight.data != nullptr) + (p.dbias.data != nullptr);
    float* const block = static_cast<float*>(p.partials) + static_cast<int64_t>(blockIdx.x) * wanted * p.width;
    if (p.dweight.data) dweight = block;
    if (p.dbias.data) dbias = block + (wanted - 1) * p.width;
    for (int64_t i = threadIdx.x; i < wanted * p.width; i += kGeneralThreads) block[i] = 0.0f;
    __syncthreads();
  }

  struct Values {
    float x[kLanes];  // the forward's input, before a gate
    float z[kLanes];
    float n[kLanes];
    float dn[kLanes];  // dL / d(n * weight + bias)
    float w[kLanes];
  };
  const auto load_values = [&](int64_t row, int64_t column, float mean, float rstd, bool first_pass, Values& v) {
    load_row_values(p.x, row, column, v.x);
    load_row_values(p.dy, row, column, v.dn);
    load_scale(p.weight, p.weight_offset, column, v.w);
    if (p.gate.data) load_row_values(p.gate, row, column, v.z);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const float u = p.gate.data && p.gate_first ? v.x[i] * activate<float>(p.activation, v.z[i]) : v.x[i];
      v.n[i] = (u - mean) * rstd;
    }
    if (p.gate.data && !p.gate_first) {
      float b[kLanes] = {};
      if (p.bias.data) load_as_float(p.bias.data, p.bias.dtype, column, b);
      float dz[kLanes];
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        const Gate gate = activate_with_derivative<float>(p.activation, v.z[i]);
        dz[i] = v.dn[i] * (v.n[i] * v.w[i] + b[i]) * gate.derivative;
        v.dn[i] *= gate.value;
      }
      if (first_pass) store_from_float(p.dgate.data, p.dgate.dtype, row * p.width + column, dz);
    }
  };

  const int64_t row_step = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock; base < p.rows; base += row_step) {
    const int64_t row = base + group;
    const bool valid = row < p.rows;
    const float rstd = valid ? static_cast<const float*>(p.rstd)[row] : 0.0f;
    const float mean = valid && p.mean ? static_cast<const float*>(p.mean)[row] : 0.0f;
    float sums[2] = {0.0f, 0.0f};  // of g * n and of g, g = dL/dn
    if (valid) {
      for (int64_t column = first_column; column < p.width; column += kColumnStep) {
        Values v;
        load_values(row, column, mean, rstd, true, v);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
          sums[0] += v.dn[i] * v.w[i] * v.n[i];
          sums[1] += v.dn[i] * v.w[i];
        }
      }
    }
    group_sum(sums);
    const float dot = sums[0] * scale;
    const float mean_g = p.kind == Kind::layer ? sums[1] * scale : 0.0f;
    for (int turn = 0; turn < kRowsPerBlock; ++turn) {  // groups share the block's columns of `partials`
      if (turn == group && valid) {
        for (int64_t column = first_column; column < p.width; column += kColumnStep) {
          Values v;
          load_values(row, column, mean, rstd, false, v);
          float dx[kLanes];
#pragma unroll
          for (int i = 0; i < kLanes; ++i) {
            dx[i] = rstd * (v.dn[i] * v.w[i] - v.n[i] * dot - mean_g);
            if (dweight) dweight[column + i] += v.dn[i] * v.n[i];
            if (dbias) dbias[column + i] += v.dn[i];
          }
          if (p.dresidual_out.data) {
            float h[kLanes];
            load_row_values(p.dresidual_out, row, column, h);
#pragma unroll
            for (int i = 0; i < kLanes; ++i) dx[i] += h[i];
          }
          if (p.gate.data && p.gate_first) {
            float dz[kLanes];
#pragma unroll
            for (int i = 0; i < kLanes; ++i) {
              const Gate gate = activate_with_derivative<float>(p.activation, v.z[i]);
              dz[i] = dx[i] * v.x[i] * gate.derivative;
              dx[i] *= gate.value;
            }
            store_from_float(p.dgate.data, p.dgate.dtype, row * p.width + column, dz);
          }
          store_from_float(p.dx.data, p.dx.dtype, row * p.width + column, dx);
          if (p.dresidual.data) {
            store_from_float(p.dresidual.data, p.dresidual.dtype, row * p.width + column, dx);
          }
        }
      }
      if constexpr (kRowsPerBlock > 1) {
        if (p.partials) __syncthreads();
      }
    }
  }
}

}  // namespace inlay::norm::cuda
