// The gradients that belong to tokens and slots: of x, of the weights, of what is shared and of its gate.
//
// A weight's gradient is <da', a> + <dy, down_bias>: the first has been summed in parts by whoever made the
// activations, the second is a warp's, as are a token's gradients of what is shared.
#include "common/cuda/launch.cuh"
#include "common/cuda/sigmoid.cuh"
#include "moe/cuda/access.cuh"
#include "moe/cuda/slot_sums.h"
#include "moe/cuda/steps.h"

namespace inlay::moe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct WeightParams {
  PaddedRows padded;
  int64_t rows = 0;  // T * K
  int64_t slots = 0;
  int64_t hidden = 0;
  int64_t parts = 0;
  const float* weight_parts = nullptr;
  RowTensor dy;
  ExpertMatrices down_bias;
  OutputTensor dweights;
};

__device__ float sum_of_parts(const WeightParams& p, int32_t place) {
  float total = 0.0f;
#pragma unroll 4
  for (int64_t part = 0; part < p.parts; ++part) total += p.weight_parts[part * p.padded.capacity + place];
  return total;
}

__device__ bool is_row(const PaddedRows& padded, int32_t place) { return place >= 0 && place < padded.capacity; }

// A slot a thread.
__global__ void __launch_bounds__(kThreads) weights_kernel(const __grid_constant__ WeightParams p) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  wait_for_predecessor();
  release_successor();
  if (slot >= p.rows) return;
  const int32_t place = p.padded.places[slot];
  store_number(p.dweights, slot, is_row(p.padded, place) ? sum_of_parts(p, place) : 0.0f);
}

// A slot a warp.
template <typename T, typename B, int N>
__global__ void __launch_bounds__(kThreads) biased_weights_kernel(const __grid_constant__ WeightParams p) {
  constexpr int kLanes = kPerAccess<T>;
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  wait_for_predecessor();
  release_successor();
  if (slot >= p.rows) return;
  const int32_t place = p.padded.places[slot];
  const int32_t expert = is_row(p.padded, place) ? p.padded.experts[place / p.padded.unit] : -1;
  float product = 0.0f;
  if (expert >= 0) {
    const T* const dy = row_of<T>(p.dy, slot / p.slots);
    const B* const bias = static_cast<const B*>(p.down_bias.data) + expert * p.down_bias.expert_stride;
#pragma unroll 2
    for (int64_t column = lane * kLanes; column < p.hidden; column += 32 * kLanes) {
      float left[kLanes], right[kLanes];
      load_part<N>(dy, column, p.hidden, left);
      if constexpr (N == kLanes) {
        unpack(load<B, N>(bias + column), right);
      } else {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) right[i] = column + i < p.hidden ? to_float(bias[column + i]) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kLanes; ++i) product = fmaf(left[i], right[i], product);
    }
  }
  product = sum_of_warp(product);
  if (lane == 0) store_number(p.dweights, slot, expert >= 0 ? product + sum_of_parts(p, place) : 0.0f);
}

struct SharedParams {
  int64_t tokens = 0;
  int64_t hidden = 0;
  RowTensor dy;
  RowTensor shared;
  VectorTensor shared_gate;   // or absent
  OutputTensor dshared;       // or not wanted
  OutputTensor dshared_gate;  // or not wanted
};

// A token a warp.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) shared_kernel(const __grid_constant__ SharedParams p) {
  constexpr int kLanes = kPerAccess<T>;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  wait_for_predecessor();
  release_successor();
  if (token >= p.tokens) return;
  const float gate = p.shared_gate.data ? sigmoid<float>(load_number(p.shared_gate, token)) : 1.0f;
  const T* const dy = row_of<T>(p.dy, token);
  const T* const shared = p.dshared_gate.data ? row_of<T>(p.shared, token) : nullptr;
  T* const dshared = p.dshared.data ? static_cast<T*>(p.dshared.data) + token * p.hidden : nullptr;
  float product = 0.0f;
#pragma unroll 2
  for (int64_t column = lane * kLanes; column < p.hidden; column += 32 * kLanes) {
    float values[kLanes];
    load_part<N>(dy, column, p.hidden, values);
    if (shared) {
      float other[kLanes];
      load_part<N>(shared, column, p.hidden, other);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) product = fmaf(values[i], other[i], product);
    }
    if (dshared) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) values[i] *= gate;
      store_part<N>(dshared, column, p.hidden, values);
    }
  }
  if (!shared) return;
  product = sum_of_warp(product);
  if (lane == 0) store_number(p.dshared_gate, token, product * (gate * (1.0f - gate)));
}

unsigned blocks_for(int64_t work, int of_block) { return static_cast<unsigned>(divide_up(work, of_block)); }

void sum_dx(const ExpertBackwardParams& params, const BackwardSteps& steps, void* stream) {
  const ExpertInputs& in = params.inputs;
  SlotSums sums;
  sums.tokens = in.tokens;
  sums.slots = in.slots;
  sums.hidden = in.hidden;
  sums.capacity = steps.padded.capacity;
  sums.places = steps.padded.places;
  sums.values = steps.dx;
  sums.y = params.dx;
  sum_slots(sums, stream);
}

void start_weights(const ExpertBackwardParams& params, const BackwardSteps& steps, void* stream) {
  const ExpertInputs& in = params.inputs;
  const WeightParams p{steps.padded,       in.most_rows(), in.slots,     in.hidden,      steps.parts,
                       steps.weight_parts, params.dy,      in.down_bias, params.dweights};
  if (!in.down_bias.data) {
    start<weights_kernel, kThreads>(p, dim3(blocks_for(p.rows, kThreads)), stream);
    return;
  }
  with_access(in.x.dtype, in.hidden, aligned_rows(p.dy) && aligned_rows(p.down_bias), [&](auto zero, auto width) {
    using T = decltype(zero);
    constexpr int kWidth = decltype(width)::value;
    const dim3 grid(blocks_for(p.rows, kWarps));
    if (in.down_bias.dtype == kDType<T>) {
      start<biased_weights_kernel<T, T, kWidth>, kThreads>(p, grid, stream);
    } else {
      start<biased_weights_kernel<T, float, kWidth>, kThreads>(p, grid, stream);
    }
  });
}

void start_shared(const ExpertBackwardParams& params, void* stream) {
  const ExpertInputs& in = params.inputs;
  const SharedParams p{in.tokens, in.hidden, params.dy, in.shared, in.shared_gate, params.dshared, params.dshared_gate};
  const bool wide = aligned_rows(p.dy) && aligned(p.dshared.data) && (!p.dshared_gate.data || aligned_rows(p.shared));
  with_access(in.x.dtype, in.hidden, wide, [&](auto zero, auto width) {
    start<shared_kernel<decltype(zero), decltype(width)::value>, kThreads>(p, dim3(blocks_for(p.tokens, kWarps)),
                                                                           stream);
  });
}

}  // namespace

void combine_gradients(const ExpertBackwardParams& params, const BackwardSteps& steps, void* stream) {
  const ExpertInputs& in = params.inputs;
  if (params.dx.data) sum_dx(params, steps, stream);
  if (params.dweights.data && in.most_rows() > 0) start_weights(params, steps, stream);
  if ((params.dshared.data || params.dshared_gate.data) && in.tokens > 0) start_shared(params, stream);
}

}  // namespace inlay::moe::cuda
