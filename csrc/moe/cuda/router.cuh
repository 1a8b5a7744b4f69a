// What the router's two kernels share. A token is a warp's: lane i has the kValues experts from i * kValues on, so that
// of equal scores the lowest index is in the first lane that has one. A slot is a lane's.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/sigmoid.cuh"
#include "moe/cuda/access.cuh"
#include "moe/cuda/steps.h"

namespace inlay::moe::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr float kLeastSum = 1e-20f;  // what keeps a sum of sigmoids from being zero

// Warps of a block; each has rows in shared memory.
template <int kValues>
constexpr int kRouterWarps = kValues < 32 ? 8 : 4;

// How many experts a row in shared memory has room for.
template <int kValues>
constexpr int kRowSize = 32 * kValues;

inline void require_supported(const RouterInputs& in) {
  if (in.logits.dtype == DType::f64) {
    inlay::cuda::fail("inlay: logits must be float32, bfloat16 or float16 on CUDA, got float64");
  }
}

// Calls use(constant) with the least kValues for so many experts.
template <class Use>
void with_values(int64_t experts, Use use) {
  if (experts <= 32) return use(std::integral_constant<int, 1>());
  if (experts <= 128) return use(std::integral_constant<int, 4>());
  if (experts <= 256) return use(std::integral_constant<int, 8>());
  if (experts <= 512) return use(std::integral_constant<int, 16>());
  return use(std::integral_constant<int, 32>());
}

inline constexpr uint32_t kNanKey = 0xffffffffu;

// Numbers in the order of choice: NaN comes first, as in torch.topk, and zeros are equal. 0 is below all of them.
__device__ inline uint32_t key_of(float value) {
  if (value != value) return kNanKey;
  const uint32_t bits = __float_as_uint(value == 0.0f ? 0.0f : value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// 0 stands for -infinity.
__device__ inline float value_of(uint32_t key) {
  if (key == 0) return -__uint_as_float(0x7f800000u);
  if (key == kNanKey) return __uint_as_float(0x7fffffffu);
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

__device__ inline float max_of_warp(float value) { return value_of(__reduce_max_sync(kAllLanes, key_of(value))); }

// A lane's share of a token: its experts' logits, and scores where they are wanted.
template <int kValues>
struct TokenScores {
  int first = 0;          // expert
  int count = 0;          // experts that there are
  float logits[kValues];  // -infinity beyond them
  float scores[kValues];  // softmax, or sigmoids; 0 beyond them
  float logsumexp = 0.0f;

  __device__ explicit TokenScores(const RouterInputs& in) {
    const int lane = threadIdx.x % 32;
    const int left = static_cast<int>(in.experts) - lane * kValues;
    first = lane * kValues;
    count = left < 0 ? 0 : left < kValues ? left : kValues;
  }

  // `wide`: rows allow accesses of 16 bytes, and every lane has all of its experts or none. Else through `row` in
  // shared memory, of which nobody reads any more.
  __device__ void load(const RouterInputs& in, bool wide, int64_t token, float* row) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) logits[i] = value_of(0);
    const int64_t start = in.logits.layout.offset(token);
    if (wide) {
      if (count > 0) load_as_float(in.logits.data, in.logits.dtype, start + first, logits);
      return;
    }
    __syncwarp();
#pragma unroll 1
    for (int e = threadIdx.x % 32; e < in.experts; e += 32) {
      float value[1];
      load_as_float(in.logits.data, in.logits.dtype, start + e, value);
      row[e] = value[0];
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (i < count) logits[i] = row[first + i];
    }
    __syncwarp();
  }

  // Sigmoids alone do without logsumexp.
  __device__ void score(Scoring scoring, bool wants_logsumexp) {
    const bool is_sigmoid = scoring == Scoring::sigmoid;
    if (!is_sigmoid || wants_logsumexp) {
      float most = logits[0];
#pragma unroll
      for (int i = 1; i < kValues; ++i) most = fmaxf(most, logits[i]);
      most = max_of_warp(most);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        scores[i] = expf(logits[i] - most);  // of those beyond: 0, or NaN where all are
        sum += scores[i];
      }
      sum = sum_of_warp(sum);
      logsumexp = most + logf(sum);
      const float inverse = 1.0f / sum;
#pragma unroll
      for (int i = 0; i < kValues; ++i) scores[i] *= inverse;
    }
    if (!is_sigmoid) return;
#pragma unroll
    for (int i = 0; i < kValues; ++i) scores[i] = sigmoid<float>(logits[i]);
  }

  // What sigmoids are divided by to be probabilities.
  __device__ float total(Scoring scoring) const {
    if (scoring != Scoring::sigmoid) return 1.0f;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kValues; ++i) sum += scores[i];
    return sum_of_warp(sum) + kLeastSum;
  }

  // Into a row in shared memory what weights are made of.
  __device__ void share(Scoring scoring, float* row) const {
#pragma unroll
    for (int i = 0; i < kValues; ++i) row[first + i] = scoring == Scoring::softmax_of_chosen ? logits[i] : scores[i];
  }
};

struct SlotWeight {
  float weight;  // before the scaling; 0 for lanes without a slot
  float total;   // what the score was divided by
};

// The weight of each lane's slot, from what share() gave; `is_slot`: it has one, whose expert exists.
__device__ inline SlotWeight weight_of(const RouterInputs& in, bool is_slot, float shared) {
  float value = is_slot ? shared : 0.0f;
  if (in.scoring == Scoring::softmax_of_chosen) {
    const float most = max_of_warp(is_slot ? value : value_of(0));
    value = is_slot ? expf(value - most) : 0.0f;
  } else if (!in.renormalize) {
    return {value, 1.0f};
  }
  const float total = sum_of_warp(value) + (in.scoring == Scoring::softmax_of_chosen ? 0.0f : kLeastSum);
  return {is_slot ? value / total : 0.0f, total};
}

}  // namespace inlay::moe::cuda
