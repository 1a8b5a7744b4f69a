// The forward of few tokens: every pair of a token and one of its slots reads its expert's matrices by itself, as fast
// as memory gives them. Pairs are the first dimension of grids, so that those of one expert read the same rows at about
// the same time, once from memory and then from L2.
//
// few_up makes the activations of all pairs, few_down the second projection and the sum over slots, in their order. A
// warp has some rows of a matrix, its lanes the summed dimension. Transposed matrices are in few_columns.cuh. What is
// added to what depends on the experts' sizes alone: a token has the same bits among any others.
//
// Only the first kernel waits at once for what came before it, and it lets its successor start after that. So whatever
// the op was given may be read by the second before it waits: when the last activation is written, it has the first of
// its weights in registers, at T = 1 of Qwen3.5 all of them.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/sigmoid.cuh"
#include "common/cuda/stream.cuh"
#include "moe/cuda/activation.cuh"
#include "moe/cuda/steps.h"

namespace inlay::moe::cuda {

struct FewParams {
  ExpertInputs inputs;
  IndexTensor indices;
  OutputTensor y;
  void* activations = nullptr;  // [T * K, I] T
  float* parts = nullptr;       // of transposed matrices: [kDepthParts, T * K, H]
};

// What is tried for speed. A warp asks for kRows * kSteps times 512 bytes before it uses any: 8 times are 32 of its 64
// registers, and 32 warps have 128 KiB on their way to a multiprocessor. An H200 needs 4.2 TB/s * 0.9 us / 132 = 28 KiB
// at all times; the rest is for the times when warps compute or blocks begin and end.
struct UpShape {
  static constexpr int kRows = 2;    // a gate and what it gates
  static constexpr int kSteps = 4;   // 1024 values of 16 bits: half a row of Qwen3.5's
  static constexpr int kWarps = 8;   // of a block
  static constexpr int kBlocks = 4;  // of a multiprocessor: T = 1 of Qwen3.5, 512 blocks, is one wave
};
struct DownShape {
  static constexpr int kRows = 4;
  static constexpr int kSteps = 2;  // 512 values of 16 bits: a row of Qwen3.5's
  static constexpr int kWarps = 8;  // of a block: the multiple of slots below, else one for each slot
};

inline constexpr int kMostFewSlots = 32;  // each has a warp of its block

__device__ inline bool has_expert(const ExpertInputs& in, int64_t expert) { return expert >= 0 && expert < in.experts; }

__device__ inline float load_value(const void* data, DType dtype, int64_t index) {
  float value[1];
  load_as_float(data, dtype, index, value);
  return value[0];
}

__device__ inline float bias_of(const ExpertMatrices& bias, int64_t expert, int64_t feature) {
  return bias.data ? load_value(bias.data, bias.dtype, expert * bias.expert_stride + feature) : 0.0f;
}

__device__ inline float weight_of(const ExpertInputs& in, int64_t pair) {
  return in.weights.data ? load_value(in.weights.data, in.weights.dtype, pair) : 1.0f;
}

// What is added to the sum of a token's experts: value times gate.
struct Shared {
  float value = 0.0f;
  float gate = 1.0f;
};

template <typename T>
__device__ inline Shared shared_of(const ExpertInputs& in, int64_t token, int64_t feature) {
  Shared shared;
  if (!in.shared.data) return shared;
  shared.value = to_float(static_cast<const T*>(in.shared.data)[token * in.shared.layout.outer_stride + feature]);
  if (in.shared_gate.data) {
    shared.gate = sigmoid<float>(load_value(in.shared_gate.data, in.shared_gate.dtype, token));
  }
  return shared;
}

template <typename T>
__device__ inline const T* matrix_of(const ExpertMatrices& matrices, int64_t expert) {
  return static_cast<const T*>(matrices.data) + expert * matrices.expert_stride;
}

template <typename T>
__device__ inline float rounded(float value) {
  return to_float(from_float<T>(value));
}

template <typename T>
__device__ inline void widen(const uint4& words, float (&values)[kPerAccess<T>]) {
  Packed<T, kPerAccess<T>> packed;
  *reinterpret_cast<uint4*>(&packed) = words;
  unpack(packed, values);
}

// Rows of a matrix: that of number r is r % 2 steps to the neighbour from the first, and r / 2 to the next pair.
// So many pointers would take more registers than there are.
template <typename T>
struct MatrixRows {
  const T* first;
  int64_t to_neighbour;
  int64_t to_next_pair;

  __device__ const T* operator[](int r) const { return first + r % 2 * to_neighbour + r / 2 * to_next_pair; }
};

// The products of kRows rows with one vector, by a warp, kSteps times 16 bytes a lane at once. Rows and vector are
// aligned to 16 bytes, and `width` is a multiple of as many.
template <typename T, int kRows, int kSteps>
class RowProducts {
 public:
  static_assert(kRows == 2 || kRows == 4, "sizes are multiples of 4");
  static constexpr int kGroup = 32 / kRows;  // lanes that get the same sum

  __device__ RowProducts(const MatrixRows<T>& rows, int width)
      : rows_(rows), left_(width - static_cast<int>(threadIdx.x % 32) * kPerAccess<T>) {
    rows_.first += threadIdx.x % 32 * kPerAccess<T>;
  }

  // Asks for the next values of the rows.
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        words_[s][r] = s * kStep < left_ ? load_streaming(rows_[r] + s * kStep) : uint4{0, 0, 0, 0};
      }
    }
  }

  // From the first values on, which are asked for, to the last ones.
  __device__ __forceinline__ void multiply(const T* vector, int width) {
    vector += threadIdx.x % 32 * kPerAccess<T>;
    for (int first = 0;;) {
      add(vector);
      first += kSteps * kStep;
      if (first >= width) return;
      vector += kSteps * kStep;
      left_ -= kSteps * kStep;
      rows_.first += kSteps * kStep;
      load();
    }
  }

  // The sum of row (lane / kGroup). At each step lanes give away the half of their rows that the lane opposite keeps,
  // until each has one: 6 exchanges for 4 rows, and not 20.
  __device__ __forceinline__ float sum() {
    const unsigned lane = threadIdx.x % 32;
    int offset = 16;
#pragma unroll
    for (int kept = kRows / 2; kept > 0; kept /= 2, offset /= 2) {
      const bool upper = lane & offset;
#pragma unroll
      for (int r = 0; r < kept; ++r) {
        const float given = upper ? sums_[r] : sums_[r + kept];
        sums_[r] = (upper ? sums_[r + kept] : sums_[r]) + __shfl_xor_sync(0xffffffffu, given, offset);
      }
    }
#pragma unroll
    for (int rest = kGroup / 2; rest > 0; rest /= 2) sums_[0] += __shfl_xor_sync(0xffffffffu, sums_[0], rest);
    return sums_[0];
  }

 private:
  static constexpr int kStep = 32 * kPerAccess<T>;  // values of a row that a warp reads with one instruction

  __device__ __forceinline__ void add(const T* vector) {
    uint4 factors[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      factors[s] = s * kStep < left_ ? *reinterpret_cast<const uint4*>(vector + s * kStep) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      float x[kPerAccess<T>];
      widen<T>(factors[s], x);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float w[kPerAccess<T>];
        widen<T>(words_[s][r], w);
#pragma unroll
        for (int i = 0; i < kPerAccess<T>; ++i) sums_[r] = fmaf(w[i], x[i], sums_[r]);
      }
    }
  }

  MatrixRows<T> rows_;
  uint4 words_[kSteps][kRows];
  float sums_[kRows] = {};
  int left_;  // values of a row from this lane's on
};

// How many features a warp makes.
template <typename Shape>
INLAY_HOST_DEVICE constexpr int up_features(bool gated) {
  return gated ? Shape::kRows / 2 : Shape::kRows;
}

// Block (pair, some features).
template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kWarps * 32, Shape::kBlocks) few_up(const __grid_constant__ FewParams p) {
  constexpr int kRows = Shape::kRows;
  const ExpertInputs& in = p.inputs;
  const bool gated = in.gating.gated, interleaved = in.gating.interleaved;
  const int pair = blockIdx.x, hidden = static_cast<int>(in.hidden), features = static_cast<int>(in.intermediate);
  const int warp = threadIdx.x / 32, first = (blockIdx.y * Shape::kWarps + warp) * up_features<Shape>(gated);
  wait_for_predecessor();
  release_successor();
  if (first >= features) return;
  const int64_t expert = p.indices[pair];
  if (!has_expert(in, expert)) return;  // nobody reads its activations

  // Pairs are a gate and what it gates.
  const bool apart = gated && !interleaved;
  const int first_row = gated && interleaved ? 2 * first : first;
  const int to_neighbour = apart ? features : 1, to_next_pair = apart ? 1 : 2;
  const int64_t stride = in.gate_up_proj.row_stride;
  RowProducts<T, kRows, Shape::kSteps> products(
      {matrix_of<T>(in.gate_up_proj, expert) + first_row * stride, to_neighbour * stride, to_next_pair * stride},
      hidden);
  products.load();
  const int own = threadIdx.x % 32 / products.kGroup;
  const float bias = bias_of(in.gate_up_bias, expert, first_row + own % 2 * to_neighbour + own / 2 * to_next_pair);
  const int64_t token = pair / static_cast<int>(in.slots);
  products.multiply(static_cast<const T*>(in.x.data) + token * in.x.layout.outer_stride, hidden);

  const float h = rounded<T>(products.sum() + bias);
  const float up = __shfl_xor_sync(0xffffffffu, h, products.kGroup);
  if (threadIdx.x % (gated ? 2 * products.kGroup : products.kGroup) != 0) return;
  static_cast<T*>(p.activations)[static_cast<int64_t>(pair) * features + first + (gated ? own / 2 : own)] =
      from_float<T>(activate<T>(in.gating, h, up));
}

// Warps of few_down's blocks for each slot: each of them makes kRows features.
template <typename Shape>
INLAY_HOST_DEVICE constexpr int down_groups(int slots) {
  return slots < Shape::kWarps ? Shape::kWarps / slots : 1;
}

// Block (token, some features).
template <typename T, typename Shape>
__global__ void __launch_bounds__(kMostFewSlots * 32, 1) few_down(const __grid_constant__ FewParams p) {
  constexpr int kRows = Shape::kRows;
  __shared__ float results[kMostFewSlots * kRows];  // [slots][groups][kRows]
  __shared__ float weights[kMostFewSlots];          // zero: no expert
  const ExpertInputs& in = p.inputs;
  const int token = blockIdx.x, hidden = static_cast<int>(in.hidden), depth = static_cast<int>(in.intermediate);
  const int slots = static_cast<int>(in.slots), groups = down_groups<Shape>(slots);
  const int warp = threadIdx.x / 32, slot = warp / groups;
  const int block_first = static_cast<int>(blockIdx.y) * groups * kRows, first = block_first + warp % groups * kRows;
  const int64_t pair = static_cast<int64_t>(token) * slots + slot;

  const int64_t expert = p.indices[pair];
  const bool active = has_expert(in, expert) && first < hidden;
  const int width = active ? depth : 0;  // nothing is read, and results are zero
  const int64_t stride = in.down_proj.row_stride;
  RowProducts<T, kRows, Shape::kSteps> products(
      {matrix_of<T>(in.down_proj, expert) + first * stride, stride, 2 * stride}, width);
  products.load();
  const int own = threadIdx.x % 32 / products.kGroup;
  float bias = 0.0f;
  if (active) bias = bias_of(in.down_bias, expert, first + own);
  if (warp % groups == 0 && threadIdx.x % 32 == 0) weights[slot] = active ? weight_of(in, pair) : 0.0f;
  const bool writes = threadIdx.x < groups * kRows && block_first + static_cast<int>(threadIdx.x) < hidden;
  Shared shared;
  if (writes) shared = shared_of<T>(in, token, block_first + threadIdx.x);

  wait_for_predecessor();
  release_successor();
  products.multiply(static_cast<const T*>(p.activations) + pair * depth, width);
  const float result = rounded<T>(products.sum() + bias);
  if (threadIdx.x % products.kGroup == 0) results[warp * kRows + own] = result;
  __syncthreads();
  if (!writes) return;
  float sum = 0.0f;
  for (int s = 0; s < slots; ++s) sum = fmaf(weights[s], results[s * groups * kRows + threadIdx.x], sum);
  static_cast<T*>(p.y.data)[static_cast<int64_t>(token) * hidden + block_first + threadIdx.x] =
      from_float<T>(fmaf(shared.gate, shared.value, sum));
}

}  // namespace inlay::moe::cuda
