// The forward of few tokens with transposed matrices, [E, in, out]: a lane has 16 bytes of neighbouring columns, and
// goes down them. few_up_columns makes activations; few_down_columns what each part of the depth gives to the second
// projection; few_sum adds up parts and slots, in their order.
#pragma once

#include "moe/cuda/few.cuh"

namespace inlay::moe::cuda {

// Half a warp reads 256 bytes of a row, so that memory sees runs of them, and a thread kSteps rows at once.
// T = 1 of gpt-oss-20b: 45 * 4 blocks and 23 * 4 * kDepthParts, of 264 that fit on an H200 with 64 KiB on their way to
// each.
struct ColumnShape {
  static constexpr int kLanes = 16;  // that share a row
  static constexpr int kSteps = 8;
  static constexpr int kWarps = 16;
  static constexpr int kBlocks = 2;
};

inline constexpr int kDepthParts = 4;  // of the second projection: the same for any tokens
inline constexpr int kSumThreads = 128;

INLAY_HOST_DEVICE constexpr int64_t depth_of_part(int64_t depth) { return (depth + kDepthParts - 1) / kDepthParts; }

template <typename T, typename Shape>
inline constexpr int kBlockColumns = Shape::kLanes * kPerAccess<T>;

template <typename T, typename Shape>
struct ColumnShared {
  float sums[Shape::kWarps][kBlockColumns<T, Shape>];
  float h[kBlockColumns<T, Shape>];
};

// The sum over rows [begin, end) of vector[row] times matrix[row * row_stride + column], for kPerAccess columns from
// this lane's first on; negative: none. Threads below kBlockColumns get that of the block's column of their number, in
// the order of lanes. `ready` is called when the first values are asked for, before the vector is read.
template <typename T, typename Shape, typename Ready>
__device__ __forceinline__ float column_sum(ColumnShared<T, Shape>& shared, const T* matrix, int64_t row_stride,
                                            int column, const T* vector, int begin, int end, Ready ready) {
  constexpr int kWidth = kPerAccess<T>, kRowLanes = 32 / Shape::kLanes, kStep = Shape::kWarps * kRowLanes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (column < 0) end = begin;
  int row = begin + warp * kRowLanes + lane / Shape::kLanes;
  const T* source = matrix + row * row_stride + column;
  float sums[kWidth] = {};
  uint4 words[Shape::kSteps];
  const auto load = [&] {
#pragma unroll
    for (int s = 0; s < Shape::kSteps; ++s) {
      words[s] = row + s * kStep < end ? load_streaming(source + s * kStep * row_stride) : uint4{0, 0, 0, 0};
    }
  };
  load();
  ready();
  while (true) {
    float factors[Shape::kSteps];
#pragma unroll
    for (int s = 0; s < Shape::kSteps; ++s) {
      factors[s] = row + s * kStep < end ? to_float(vector[row + s * kStep]) : 0.0f;
    }
#pragma unroll
    for (int s = 0; s < Shape::kSteps; ++s) {
      float w[kWidth];
      widen<T>(words[s], w);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sums[i] = fmaf(w[i], factors[s], sums[i]);
    }
    row += Shape::kSteps * kStep;
    if (row >= end) break;
    source += Shape::kSteps * kStep * row_stride;
    load();
  }
#pragma unroll
  for (int offset = 16; offset >= Shape::kLanes; offset /= 2) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], offset);
  }
  if (lane < Shape::kLanes) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) shared.sums[warp][lane * kWidth + i] = sums[i];
  }
  __syncthreads();
  float sum = 0.0f;
  if (threadIdx.x < kBlockColumns<T, Shape>) {
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) sum += shared.sums[w][threadIdx.x];
  }
  return sum;
}

// Block (pair, some features).
template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kWarps * 32, Shape::kBlocks)
    few_up_columns(const __grid_constant__ FewParams p) {
  constexpr int kColumns = kBlockColumns<T, Shape>, kWidth = kPerAccess<T>;
  __shared__ ColumnShared<T, Shape> shared;
  const ExpertInputs& in = p.inputs;
  const bool gated = in.gating.gated, interleaved = in.gating.interleaved;
  const int pair = blockIdx.x, features = static_cast<int>(in.intermediate);
  const int block_features = gated ? kColumns / 2 : kColumns;
  const int first = static_cast<int>(blockIdx.y) * block_features;
  wait_for_predecessor();
  release_successor();
  const int64_t expert = p.indices[pair];
  if (!has_expert(in, expert)) return;

  // The matrix's column of the block's; negative: none. Gates come first, then what they gate; or they take turns.
  const auto matrix_column = [&](int column) {
    if (gated && interleaved) return 2 * first + column < 2 * features ? 2 * first + column : -1;
    const int feature = first + column % block_features;
    return feature < features ? column / block_features * features + feature : -1;
  };
  const int64_t token = pair / static_cast<int>(in.slots);
  const float sum = column_sum<T, Shape>(shared, matrix_of<T>(in.gate_up_proj, expert), in.gate_up_proj.row_stride,
                                         matrix_column(static_cast<int>(threadIdx.x) % Shape::kLanes * kWidth),
                                         static_cast<const T*>(in.x.data) + token * in.x.layout.outer_stride, 0,
                                         static_cast<int>(in.hidden), [] {});
  if (threadIdx.x < kColumns) {
    const int column = matrix_column(threadIdx.x);
    shared.h[threadIdx.x] = column < 0 ? 0.0f : rounded<T>(sum + bias_of(in.gate_up_bias, expert, column));
  }
  __syncthreads();
  const int own = threadIdx.x;
  if (own >= block_features || first + own >= features) return;
  const float gate = shared.h[gated && interleaved ? 2 * own : own];
  const float up = gated ? shared.h[interleaved ? 2 * own + 1 : block_features + own] : 0.0f;
  static_cast<T*>(p.activations)[static_cast<int64_t>(pair) * features + first + own] =
      from_float<T>(activate<T>(in.gating, gate, up));
}

// Block (pair, some features, part of the depth).
template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kWarps * 32, Shape::kBlocks)
    few_down_columns(const __grid_constant__ FewParams p) {
  constexpr int kColumns = kBlockColumns<T, Shape>;
  __shared__ ColumnShared<T, Shape> shared;
  const ExpertInputs& in = p.inputs;
  const int pair = blockIdx.x, hidden = static_cast<int>(in.hidden), depth = static_cast<int>(in.intermediate);
  const int first = static_cast<int>(blockIdx.y) * kColumns, part = blockIdx.z;
  const int part_depth = static_cast<int>(depth_of_part(depth));
  const int64_t expert = p.indices[pair];
  if (!has_expert(in, expert)) return;
  const int column = first + static_cast<int>(threadIdx.x) % Shape::kLanes * kPerAccess<T>;
  const int begin = part * part_depth;
  const float sum = column_sum<T, Shape>(shared, matrix_of<T>(in.down_proj, expert), in.down_proj.row_stride,
                                         column < hidden ? column : -1,
                                         static_cast<const T*>(p.activations) + static_cast<int64_t>(pair) * depth,
                                         begin, begin + part_depth < depth ? begin + part_depth : depth, [] {
                                           wait_for_predecessor();
                                           release_successor();
                                         });
  const int own = first + static_cast<int>(threadIdx.x);
  if (threadIdx.x >= kColumns || own >= hidden) return;
  p.parts[(static_cast<int64_t>(part) * gridDim.x + pair) * hidden + own] =
      sum + (part == 0 ? bias_of(in.down_bias, expert, own) : 0.0f);
}

// Block (token, some features), a thread for each.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) few_sum(const __grid_constant__ FewParams p) {
  constexpr int kAtOnce = 4;  // slots
  __shared__ bool used[kMostFewSlots];
  __shared__ float weights[kMostFewSlots];
  const ExpertInputs& in = p.inputs;
  const int64_t token = blockIdx.x, hidden = in.hidden, feature = int64_t{blockIdx.y} * kSumThreads + threadIdx.x;
  const int slots = static_cast<int>(in.slots);
  if (threadIdx.x < slots) {
    used[threadIdx.x] = has_expert(in, p.indices[token * slots + threadIdx.x]);
    weights[threadIdx.x] = weight_of(in, token * slots + threadIdx.x);
  }
  Shared shared;
  if (feature < hidden) shared = shared_of<T>(in, token, feature);
  __syncthreads();
  wait_for_predecessor();
  release_successor();
  if (feature >= hidden) return;
  float total = 0.0f;
  for (int first = 0; first < slots; first += kAtOnce) {
    float parts[kAtOnce][kDepthParts];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const bool any = first + i < slots && used[first + i];
#pragma unroll
      for (int part = 0; part < kDepthParts; ++part) {
        const int64_t row = part * in.most_rows() + token * slots + first + i;
        parts[i][part] = any ? p.parts[row * hidden + feature] : 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= slots || !used[first + i]) continue;
      float sum = 0.0f;
#pragma unroll
      for (int part = 0; part < kDepthParts; ++part) sum += parts[i][part];
      total = fmaf(weights[first + i], rounded<T>(sum), total);
    }
  }
  static_cast<T*>(p.y.data)[token * hidden + feature] = from_float<T>(fmaf(shared.gate, shared.value, total));
}

}  // namespace inlay::moe::cuda
