// The gradient of the router's logits, from those of the weights, of the mean probabilities and of logsumexp. Scores
// are computed again. What slots give goes through a row in shared memory to the lanes that have their experts.
#include "moe/cuda/router.cuh"

namespace inlay::moe {
namespace cuda {
namespace {

constexpr int64_t kBlocksPerProcessor = 8;

struct Params {
  RouterBackwardParams router;
  bool wide = false;
  bool wide_gradient = false;
};

// What a token's weight is worth in the mean: the slots of a token over those of all that were counted.
__device__ float share_of_token(const RouterBackwardParams& p) {
  if (!p.dmean_probabilities.data) return 0.0f;
  float tokens = 0.0f;
  for (int64_t e = threadIdx.x % 32; e < p.inputs.experts; e += 32) tokens += static_cast<float>(p.counts[e]);
  tokens = sum_of_warp(tokens);
  return tokens > 0.0f ? static_cast<float>(p.inputs.slots) / tokens : 0.0f;
}

// The gradient of each slot's score or, where the softmax is over those chosen, of its logit.
__device__ float slot_gradient(const RouterBackwardParams& p, int64_t token, bool is_slot, float shared) {
  const RouterInputs& in = p.inputs;
  const SlotWeight slot = weight_of(in, is_slot, shared);
  float dweight[1] = {0.0f};
  if (is_slot) {
    const int64_t row = p.dweights.layout.offset(token);
    load_as_float(p.dweights.data, p.dweights.dtype, row + threadIdx.x % 32, dweight);
    dweight[0] *= static_cast<float>(in.scaling);
  }
  const bool of_chosen = in.scoring == Scoring::softmax_of_chosen;
  const float mean = of_chosen || in.renormalize ? sum_of_warp(is_slot ? slot.weight * dweight[0] : 0.0f) : 0.0f;
  if (!is_slot) return 0.0f;
  return of_chosen ? slot.weight * (dweight[0] - mean) : (dweight[0] - mean) / slot.total;
}

// Adds up the slots' gradients by expert, in the order of slots where a token names an expert twice. row: of zeros.
__device__ void spread(bool is_slot, int index, float gradient, float* of_slots, float* row) {
  const int lane = threadIdx.x % 32;
  of_slots[lane] = gradient;
  __syncwarp();
  unsigned alike = __match_any_sync(kAllLanes, is_slot ? index : -1);
  if (is_slot && lane == __ffs(alike) - 1) {
    float sum = 0.0f;
    for (; alike; alike &= alike - 1) sum += of_slots[__ffs(alike) - 1];
    row[index] = sum;
  }
  __syncwarp();
}

template <int kValues>
__global__ void __launch_bounds__(32 * kRouterWarps<kValues>)
    router_backward_kernel(const __grid_constant__ Params params) {
  constexpr int kWarps = kRouterWarps<kValues>;
  __shared__ float rows[kWarps][kRowSize<kValues>];
  __shared__ float slots[kWarps][32];
  const RouterBackwardParams& p = params.router;
  const RouterInputs& in = p.inputs;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool is_sigmoid = in.scoring == Scoring::sigmoid, of_chosen = in.scoring == Scoring::softmax_of_chosen;
  float* const row = rows[warp];
  wait_for_predecessor();
  release_successor();
  const float share = share_of_token(p);
  const float* const dmeans = static_cast<const float*>(p.dmean_probabilities.data);
  TokenScores<kValues> own(in);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + warp; token < in.tokens; token += step) {
    own.load(in, params.wide, token, row);
    own.score(in.scoring, p.dlogsumexp.data != nullptr);
    float of_slots[kValues] = {};
    if (p.dweights.data) {
      own.share(in.scoring, row);
      const int64_t index = lane < in.slots ? p.indices[token * in.slots + lane] : -1;
      const bool is_slot = index >= 0 && index < in.experts;
      __syncwarp();
      const float shared = is_slot ? row[index] : 0.0f;
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kValues; ++i) row[own.first + i] = 0.0f;
      __syncwarp();
      spread(is_slot, static_cast<int>(index), slot_gradient(p, token, is_slot, shared), slots[warp], row);
#pragma unroll
      for (int i = 0; i < kValues; ++i) of_slots[i] = row[own.first + i];
      __syncwarp();
    }

    float gradient[kValues];  // of the scores
#pragma unroll
    for (int i = 0; i < kValues; ++i) gradient[i] = of_chosen ? 0.0f : of_slots[i];
    if (dmeans && (!in.mask || in.mask[token])) {
      const float total = own.total(in.scoring);
      float dmean[kValues], mean = 0.0f;
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        dmean[i] = i < own.count ? dmeans[own.first + i] : 0.0f;
        mean += own.scores[i] / total * dmean[i];
      }
      mean = is_sigmoid ? sum_of_warp(mean) : 0.0f;  // a softmax has it taken off below
#pragma unroll
      for (int i = 0; i < kValues; ++i) gradient[i] += (dmean[i] - mean) / total * share;
    }
    const float dlogsumexp = p.dlogsumexp.data ? static_cast<const float*>(p.dlogsumexp.data)[token] : 0.0f;
    float mean = 0.0f;
    if (!is_sigmoid) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) mean += own.scores[i] * gradient[i];
      mean = sum_of_warp(mean);
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const float score = own.scores[i];
      if (is_sigmoid) {
        gradient[i] *= score * (1.0f - score);
        if (dlogsumexp != 0.0f) gradient[i] += dlogsumexp * expf(own.logits[i] - own.logsumexp);
      } else {
        gradient[i] = (of_chosen ? of_slots[i] : 0.0f) + score * ((gradient[i] - mean) + dlogsumexp);
      }
    }
    const int64_t start = token * in.experts;
    if (params.wide_gradient) {
      if (own.count > 0) store_from_float(p.dlogits.data, p.dlogits.dtype, start + own.first, gradient);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) row[own.first + i] = gradient[i];
    __syncwarp();
#pragma unroll 1
    for (int e = lane; e < in.experts; e += 32) store_number(p.dlogits, start + e, row[e]);
    __syncwarp();
  }
}

}  // namespace
}  // namespace cuda

void route_backward(const RouterBackwardParams& params, void* stream) {
  const RouterInputs& in = params.inputs;
  cuda::require_supported(in);
  if (in.tokens == 0) return;
  cuda::with_values(in.experts, [&](auto values) {
    constexpr int kValues = decltype(values)::value;
    constexpr int kWarps = cuda::kRouterWarps<kValues>;
    const bool whole = kValues > 1 && in.experts % kValues == 0;
    const int64_t row_bytes = in.experts * size_of(params.dlogits.dtype);
    const cuda::Params launch{params, whole && cuda::aligned_rows(in.logits),
                              whole && cuda::aligned(params.dlogits.data) && row_bytes % 16 == 0};
    const int64_t most = inlay::cuda::multiprocessor_count() * cuda::kBlocksPerProcessor;
    const int64_t needed = cuda::divide_up(in.tokens, kWarps);
    inlay::cuda::start<cuda::router_backward_kernel<kValues>, 32 * kWarps>(
        launch, dim3(static_cast<unsigned>(needed < most ? needed : most)), stream);
  });
}

}  // namespace inlay::moe
