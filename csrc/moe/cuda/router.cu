// The router: scores, the choice of experts, their weights, and what losses and monitors want to know of all experts.
//
// Experts are chosen one after another: the lanes' highest keys are compared in one instruction, and of the lanes that
// have it the first gives its own up. With statistics, each warp walks over tokens and adds up in shared memory; blocks
// leave a row of sums each, which a second kernel adds in their order.
#include "moe/cuda/router.cuh"

namespace inlay::moe {
namespace cuda {
namespace {

constexpr int kBlocksPerProcessor = 4;  // with statistics: each leaves a row of sums
constexpr int kSumColumns = 8;
constexpr int kSumThreads = 256;

struct Params {
  RouterForwardParams router;
  bool wide = false;
  int64_t blocks = 0;
  float* sums = nullptr;       // [blocks, E]
  int32_t* counts = nullptr;   // [blocks, E]
  int32_t* counted = nullptr;  // [blocks] tokens
};

// Leaves the groups whose two highest keys have the largest sums. `keys` is the token's row, `sums` room for as many.
__device__ void exclude_groups(const RouterForwardParams& p, uint32_t* keys, float* sums) {
  const int groups = static_cast<int>(p.groups), size = static_cast<int>(p.inputs.experts / p.groups);
  const int lane = threadIdx.x % 32;
  for (int group = lane; group < groups; group += 32) {
    uint32_t first = 0, second = 0;
    int at = lane % size;  // so that lanes start in different banks
    for (int i = 0; i < size; ++i) {
      const uint32_t key = keys[group * size + at];
      at = at + 1 < size ? at + 1 : 0;
      second = key > first ? first : key > second ? key : second;
      first = key > first ? key : first;
    }
    sums[group] = value_of(first) + value_of(second);
  }
  __syncwarp();
  for (int group = lane; group < groups; group += 32) {
    const uint32_t own = key_of(sums[group]);
    int before = 0;
    for (int other = 0; other < groups; ++other) {
      const uint32_t key = key_of(sums[other]);
      before += key > own || (key == own && other < group);
    }
    if (before < p.chosen_groups) continue;
    for (int i = 0; i < size; ++i) keys[group * size + i] = key_of(value_of(0));
  }
  __syncwarp();
}

template <int kValues>
class Warp {
 public:
  // Rows of kRowSize in shared memory, this warp's own but for the last two.
  struct Memory {
    float* shared;
    uint32_t* keys;
    float* group_sums;
    float* sums;
    int32_t* counts;
    const float* bias;
  };

  __device__ Warp(const Params& params, const Memory& memory)
      : params_(params), p_(params.router), in_(params.router.inputs), memory_(memory), token_(in_) {}

  __device__ void route(int64_t token) {
    const bool has_statistics = p_.counts != nullptr;
    token_.load(in_, params_.wide, token, memory_.shared);
    if (in_.scoring != Scoring::softmax_of_chosen || has_statistics) token_.score(in_.scoring, has_statistics);
    token_.share(in_.scoring, memory_.shared);
    uint32_t least = 0;
    const int64_t index = p_.forced.data ? forced(token, has_statistics, least) : choose(least);
    __syncwarp();
    const bool has_slot = lane_ < in_.slots;
    // A forced index that is no expert's: the device cannot say so. Like a slot of no expert, it weighs nothing.
    const bool is_slot = has_slot && index >= 0 && index < in_.experts;
    const float weight = weight_of(in_, is_slot, is_slot ? memory_.shared[index] : 0.0f).weight;
    if (has_slot) {
      const int64_t slot = token * in_.slots + lane_;
      store_number(p_.weights, slot, weight * static_cast<float>(in_.scaling));
      p_.indices[slot] = index;
    }
    if (has_statistics) add_statistics(token, is_slot, index, least);
    __syncwarp();
  }

 private:
  // What experts are chosen by.
  __device__ void fill_keys() {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      keys_[i] = 0;
      if (i >= token_.count) continue;
      float value = in_.scoring == Scoring::softmax_of_chosen ? token_.logits[i] : token_.scores[i];
      if (p_.bias.data) value += memory_.bias[token_.first + i];
      keys_[i] = key_of(value);
    }
  }
  __device__ void store_keys() {
#pragma unroll
    for (int i = 0; i < kValues; ++i) memory_.keys[token_.first + i] = keys_[i];
    __syncwarp();
  }
  __device__ void reload_keys() {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kValues; ++i) keys_[i] = memory_.keys[token_.first + i];
  }

  // The index of this lane's slot. `least`: the least key that was chosen, or NaN's.
  __device__ int64_t choose(uint32_t& least) {
    fill_keys();
    if (p_.chosen_groups < p_.groups) {
      store_keys();
      exclude_groups(p_, memory_.keys, memory_.group_sums);
      reload_keys();
    }
    int chosen = 0;
    for (int slot = 0; slot < static_cast<int>(in_.slots); ++slot) {
      uint32_t highest = keys_[0];
      int at = 0;
#pragma unroll
      for (int i = 1; i < kValues; ++i) {
        at = keys_[i] > highest ? i : at;
        highest = keys_[i] > highest ? keys_[i] : highest;
      }
      const uint32_t best = __reduce_max_sync(kAllLanes, highest);
      least = slot > 0 && least == kNanKey ? kNanKey : best;
      const int owner = __ffs(__ballot_sync(kAllLanes, highest == best)) - 1;
      const int index = __shfl_sync(kAllLanes, token_.first + at, owner);
      if (lane_ == slot) chosen = index;
#pragma unroll
      for (int i = 0; i < kValues; ++i) keys_[i] = token_.first + i == index ? 0 : keys_[i];
    }
    return chosen;
  }

  __device__ int64_t forced(int64_t token, bool has_statistics, uint32_t& least) {
    const int64_t index = lane_ < in_.slots ? p_.forced[token * in_.slots + lane_] : -1;
    if (!has_statistics) return index;
    fill_keys();
    store_keys();
    const bool exists = index >= 0 && index < in_.experts;
    const uint32_t key = exists ? memory_.keys[index] : kNanKey;
    least = __reduce_min_sync(kAllLanes, key);
    if (__any_sync(kAllLanes, exists && key == kNanKey)) least = kNanKey;
    if (exists) memory_.keys[index] = 0;
    reload_keys();
    return index;
  }

  __device__ void add_statistics(int64_t token, bool is_slot, int64_t index, uint32_t least) {
    const bool is_sigmoid = in_.scoring == Scoring::sigmoid;
    const float total = token_.total(in_.scoring);
    // -log of a score: the softplus of -logit, or logsumexp - logit. A score of zero adds nothing, whatever that is.
    float surprise = 0.0f;
    uint32_t largest = 0, other = 0;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (i >= token_.count) continue;
      const float logit = fmaxf(-1e30f, token_.logits[i]);
      const float negative_log =
          is_sigmoid ? fmaxf(-logit, 0.0f) + log1pf(expf(-fabsf(logit))) : token_.logsumexp - logit;
      surprise += token_.scores[i] * negative_log;
      const uint32_t size = __float_as_uint(token_.logits[i]) & 0x7fffffffu;  // NaN's is the largest
      largest = size > largest ? size : largest;
      other = keys_[i] > other ? keys_[i] : other;
    }
    // Where all scores are zero, so are the probabilities.
    const float of_total = is_sigmoid ? logf(total) * ((total - kLeastSum) / total) : 0.0f;
    const float entropy = sum_of_warp(surprise) / total + of_total;
    largest = __reduce_max_sync(kAllLanes, largest);
    other = __reduce_max_sync(kAllLanes, other);
    if (lane_ == 0) {
      float* const measures = static_cast<float*>(p_.measures.data) + token;
      measures[0] = entropy;
      measures[in_.tokens] = value_of(least) - value_of(other);
      measures[2 * in_.tokens] = __uint_as_float(largest);
      static_cast<float*>(p_.logsumexp.data)[token] = token_.logsumexp;
    }
    if (in_.mask && !in_.mask[token]) return;
    if (is_slot) atomicAdd(memory_.counts + index, 1);
#pragma unroll
    for (int i = 0; i < kValues; ++i) memory_.sums[token_.first + i] += token_.scores[i] / total;
  }

  const Params& params_;
  const RouterForwardParams& p_;
  const RouterInputs& in_;
  const Memory memory_;
  const int lane_ = threadIdx.x % 32;
  TokenScores<kValues> token_;
  uint32_t keys_[kValues];
};

// For each warp the rows of its Memory, then the counts and the bias.
template <int kValues>
constexpr int kSharedBytes = (4 * kRouterWarps<kValues> + 2) * kRowSize<kValues> * static_cast<int>(sizeof(float));

template <int kValues>
__global__ void __launch_bounds__(32 * kRouterWarps<kValues>) router_kernel(const __grid_constant__ Params params) {
  constexpr int kWarps = kRouterWarps<kValues>;
  constexpr int kSize = kRowSize<kValues>;
  extern __shared__ float shared_rows[];
  const RouterInputs& in = params.router.inputs;
  const int warp = threadIdx.x / 32;
  const bool has_statistics = params.router.counts != nullptr;
  float* const own = shared_rows + warp * 4 * kSize;
  int32_t* const counts = reinterpret_cast<int32_t*>(shared_rows + kWarps * 4 * kSize);
  if (has_statistics) {
    for (int i = threadIdx.x; i < kSize; i += 32 * kWarps) counts[i] = 0;
    for (int i = threadIdx.x % 32; i < kSize; i += 32) own[3 * kSize + i] = 0.0f;
    __syncthreads();
  }
  wait_for_predecessor();
  release_successor();
  const VectorTensor& bias = params.router.bias;
  float* const shared_bias = shared_rows + (kWarps * 4 + 1) * kSize;
  if (bias.data) {
#pragma unroll 1
    for (int e = threadIdx.x; e < in.experts; e += 32 * kWarps) shared_bias[e] = load_number(bias, e);
    __syncthreads();
  }
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  int32_t counted = 0;
  Warp<kValues> router(
      params, {own, reinterpret_cast<uint32_t*>(own + kSize), own + 2 * kSize, own + 3 * kSize, counts, shared_bias});
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + warp; token < in.tokens; token += step) {
    router.route(token);
    if (has_statistics && (!in.mask || in.mask[token])) ++counted;
  }
  if (!has_statistics) return;

  __shared__ int32_t counted_by[kWarps];
  counted_by[warp] = counted;
  __syncthreads();
  for (int e = threadIdx.x; e < in.experts; e += 32 * kWarps) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += shared_rows[(4 * i + 3) * kSize + e];
    params.sums[blockIdx.x * in.experts + e] = sum;
    params.counts[blockIdx.x * in.experts + e] = counts[e];
  }
  if (threadIdx.x > 0) return;
  counted = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) counted += counted_by[i];
  params.counted[blockIdx.x] = counted;
}

// Grid: experts. Thread i has column i % kSumColumns of every so many'th block.
__global__ void __launch_bounds__(kSumThreads) sum_statistics_kernel(const __grid_constant__ Params params) {
  constexpr int kRows = kSumThreads / kSumColumns;
  __shared__ float sums[kRows][kSumColumns];
  __shared__ int64_t counts[kRows][kSumColumns];
  __shared__ int64_t counted[kRows];
  const int column = threadIdx.x % kSumColumns, row = threadIdx.x / kSumColumns;
  const int64_t experts = params.router.inputs.experts;
  const int64_t expert = static_cast<int64_t>(blockIdx.x) * kSumColumns + column;
  wait_for_predecessor();
  release_successor();
  float sum = 0.0f;
  int64_t count = 0, tokens = 0;
#pragma unroll 4
  for (int64_t block = row; block < params.blocks; block += kRows) {
    if (column == 0) tokens += params.counted[block];
    if (expert >= experts) continue;
    sum += params.sums[block * experts + expert];
    count += params.counts[block * experts + expert];
  }
  sums[row][column] = sum;
  counts[row][column] = count;
  if (column == 0) counted[row] = tokens;
  __syncthreads();
  if (row > 0 || expert >= experts) return;
  sum = 0.0f;
  count = tokens = 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    sum += sums[i][column];
    count += counts[i][column];
    tokens += counted[i];
  }
  params.router.counts[expert] = count;
  static_cast<float*>(params.router.mean_probabilities.data)[expert] =
      sum / static_cast<float>(tokens > 0 ? tokens : 1);
}

// With statistics no more than are worth a row of sums each.
int64_t blocks_of(const RouterForwardParams& p, int warps) {
  const int64_t blocks = divide_up(p.inputs.tokens, warps);
  const int64_t most = static_cast<int64_t>(multiprocessor_count()) * kBlocksPerProcessor;
  return p.counts && blocks > most ? most : blocks;
}

int64_t sums_bytes(const RouterForwardParams& p, int64_t blocks) {
  return blocks * (2 * p.inputs.experts + 1) * static_cast<int64_t>(sizeof(float));
}

}  // namespace
}  // namespace cuda

int64_t scratch_bytes(const RouterForwardParams& params) {
  if (!params.counts) return 0;
  int64_t bytes = 0;
  cuda::with_values(params.inputs.experts, [&](auto values) {
    bytes = cuda::sums_bytes(params, cuda::blocks_of(params, cuda::kRouterWarps<decltype(values)::value>));
  });
  return bytes;
}

void route(const RouterForwardParams& params, void* stream) {
  const RouterInputs& in = params.inputs;
  cuda::require_supported(in);
  cuda::with_values(in.experts, [&](auto values) {
    constexpr int kValues = decltype(values)::value;
    constexpr int kWarps = cuda::kRouterWarps<kValues>;
    cuda::Params launch;
    launch.router = params;
    launch.wide = kValues > 1 && in.experts % kValues == 0 && cuda::aligned_rows(in.logits);
    launch.blocks = cuda::blocks_of(params, kWarps);
    if (params.counts) {
      launch.sums = static_cast<float*>(params.scratch);
      launch.counts = reinterpret_cast<int32_t*>(launch.sums + launch.blocks * in.experts);
      launch.counted = launch.counts + launch.blocks * in.experts;
    }
    if (launch.blocks > 0) {
      inlay::cuda::start<cuda::router_kernel<kValues>, 32 * kWarps, cuda::kSharedBytes<kValues>>(
          launch, dim3(static_cast<unsigned>(launch.blocks)), stream);
    }
    if (!params.counts) return;
    const auto blocks = static_cast<unsigned>(cuda::divide_up(in.experts, cuda::kSumColumns));
    inlay::cuda::start<cuda::sum_statistics_kernel, cuda::kSumThreads>(launch, dim3(blocks), stream);
  });
}

}  // namespace inlay::moe
