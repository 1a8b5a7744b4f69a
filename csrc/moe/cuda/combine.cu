// The sums over each token's slots: every value is read once, and nothing else counts. A thread has 16 bytes of a
// token's result, and all its slots' under way at once, up to kLoads; a block has a token, part of one, or several.
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
  int column_bits = 0;  // a block's vectors of a token: so many bits of the thread's number
};

// Grid: tokens, vectors.
template <typename T, int N>
__global__ void __launch_bounds__(kMostThreads) sum_slots_kernel(const __grid_constant__ Params params) {
  const SlotSums& p = params.sums;
  const int64_t tokens_of_block = blockDim.x >> params.column_bits;
  const int64_t token = blockIdx.x * tokens_of_block + (threadIdx.x >> params.column_bits);
  const int64_t vector =
      (static_cast<int64_t>(blockIdx.y) << params.column_bits) + (threadIdx.x & ((1 << params.column_bits) - 1));
  const int64_t column = vector * N;
  wait_for_predecessor();
  release_successor();
  if (token >= p.tokens || column >= p.hidden) return;

  Packed<T, N> shared;
  float gate = 1.0f;
  if (p.shared.data) {
    shared = load<T, N>(row_of<T>(p.shared, token) + column);
    if (p.shared_gate.data) gate = sigmoid<float>(load_number(p.shared_gate, token));
  }
  const T* const values = static_cast<const T*>(p.values) + column;
  float sum[N] = {};
  for (int64_t slot = token * p.slots, end = slot + p.slots; slot < end; slot += kLoads) {
    Packed<T, N> value[kLoads];
    float weight[kLoads];
    bool given[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      given[j] = false;
      if (slot + j >= end) continue;
      const int32_t place = p.places[slot + j];
      given[j] = place >= 0 && place < p.capacity;
      if (given[j]) value[j] = load<T, N>(values + place * p.hidden);
      weight[j] = p.weights.data ? load_number(p.weights, slot + j) : 1.0f;
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      if (!given[j]) continue;
      float wide[N];
      unpack(value[j], wide);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] = fmaf(weight[j], wide[i], sum[i]);
    }
  }
  if (p.shared.data) {
    float wide[N];
    unpack(shared, wide);
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
    start_sized<sum_slots_kernel<decltype(zero), kWidth>>(Params{sums, bits}, grid, threads, 0, 0, stream);
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
