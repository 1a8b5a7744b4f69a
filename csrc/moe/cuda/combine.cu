// The sums over each token's slots: every value is read once, and nothing else counts. A thread has 16 bytes of a
// token's result, and its slots' under way at once, kLoads of them; a block has a token, part of one, or several, and
// reads for all its threads where their values are.
#include "common/cuda/launch.cuh"
#include "common/cuda/sigmoid.cuh"
#include "moe/cuda/access.cuh"
#include "moe/cuda/slot_sums.h"
#include "moe/cuda/steps.h"

namespace inlay::moe::cuda {
namespace {

constexpr int kMostThreads = 256;
constexpr int kFewestThreads = 64;  // where tokens are few
constexpr int kLoads = 8;

struct Params {
  SlotSums sums;
  uint32_t capacity = 0;
  uint32_t hidden = 0;
  int slots = 0;
  int column_bits = 0;  // a block's vectors of a token: so many bits of the thread's number
};

struct Entry {
  int32_t place = -1;  // none
  float weight = 0.0f;
};

// Grid: tokens, vectors.
template <typename T, int N>
__global__ void __launch_bounds__(kMostThreads) sum_slots_kernel(const __grid_constant__ Params params) {
  __shared__ Entry entries[kMostThreads * kLoads];  // [tokens of the block, kLoads]
  const SlotSums& p = params.sums;
  const int tokens_of_block = blockDim.x >> params.column_bits;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * tokens_of_block;
  const int own = threadIdx.x >> params.column_bits;
  const uint32_t vector = (blockIdx.y << params.column_bits) + (threadIdx.x & ((1u << params.column_bits) - 1));
  const uint32_t column = vector * N;
  const T* const values = static_cast<const T*>(p.values) + column;
  wait_for_predecessor();
  release_successor();

  float sum[N] = {};
#pragma unroll 1
  for (int first = 0; first < params.slots; first += kLoads) {
    if (first > 0) __syncthreads();
    for (int i = threadIdx.x; i < tokens_of_block * kLoads; i += blockDim.x) {
      const int64_t token = first_token + i / kLoads;
      const int slot = first + i % kLoads;
      Entry entry;
      if (token < p.tokens && slot < params.slots) {
        const int64_t index = token * params.slots + slot;
        const int32_t place = p.places[index];
        if (static_cast<uint32_t>(place) < params.capacity) {
          entry = {place, p.weights.data ? load_number(p.weights, index) : 1.0f};
        }
      }
      entries[i] = entry;
    }
    __syncthreads();
    if (column >= params.hidden) continue;
    Packed<T, N> value[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int32_t place = entries[own * kLoads + j].place;  // of none: any, so that no load waits for a branch
      value[j] = load<T, N>(values + static_cast<uint64_t>(place < 0 ? 0 : place) * params.hidden);
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const Entry entry = entries[own * kLoads + j];
      if (entry.place < 0) continue;
      float wide[N];
      unpack(value[j], wide);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] = fmaf(entry.weight, wide[i], sum[i]);
    }
  }
  const int64_t token = first_token + own;
  if (token >= p.tokens || column >= params.hidden) return;
  if (p.shared.data) {
    const float gate = p.shared_gate.data ? sigmoid<float>(load_number(p.shared_gate, token)) : 1.0f;
    float wide[N];
    unpack(load<T, N>(row_of<T>(p.shared, token) + column), wide);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = fmaf(gate, wide[i], sum[i]);
  }
  store(static_cast<T*>(p.y.data) + token * p.hidden + column, pack<T>(sum));
}

// A block's vectors of a token: as many as can be without an eighth of the threads having none.
int column_bits_of(int64_t vectors, int threads) {
  int bits = 0;
  while ((1 << bits) < threads && (int64_t{1} << bits) < vectors) ++bits;
  while (bits > 5 && (divide_up(vectors, int64_t{1} << bits) << bits) - vectors > vectors / 8) --bits;
  return bits;
}

}  // namespace

void sum_slots(const SlotSums& sums, void* stream) {
  if (sums.tokens == 0) return;
  const bool wide = aligned(sums.values) && aligned(sums.y.data) && (!sums.shared.data || aligned_rows(sums.shared));
  with_access(sums.y.dtype, sums.hidden, wide, [&](auto zero, auto width) {
    constexpr int kWidth = decltype(width)::value;
    const int64_t vectors = sums.hidden / kWidth;
    int threads = kMostThreads;
    while (threads > kFewestThreads && sums.tokens * vectors < static_cast<int64_t>(threads) * multiprocessor_count()) {
      threads /= 2;
    }
    const int bits = column_bits_of(vectors, threads);
    const dim3 grid(static_cast<unsigned>(divide_up(sums.tokens, threads >> bits)),
                    static_cast<unsigned>(divide_up(vectors, int64_t{1} << bits)));
    const Params params{sums, static_cast<uint32_t>(sums.capacity), static_cast<uint32_t>(sums.hidden),
                        static_cast<int>(sums.capacity > 0 ? sums.slots : 0), bits};
    start_sized<sum_slots_kernel<decltype(zero), kWidth>>(params, grid, threads, 0, 0, stream);
  });
}

void combine(const ExpertForwardParams& params, const PaddedRows& padded, const void* results, void* stream) {
  const ExpertInputs& in = params.inputs;
  SlotSums sums;
  sums.tokens = in.tokens;
  sums.slots = in.slots;
  sums.hidden = in.hidden;
  sums.capacity = padded.capacity;
  sums.places = padded.places;
  sums.values = results;
  sums.weights = in.weights;
  sums.shared = in.shared;
  sums.shared_gate = in.shared_gate;
  sums.y = params.y;
  sum_slots(sums, stream);
}

}  // namespace inlay::moe::cuda
