// What the backward's warpgroups do between their products, whichever way they share the work.
#pragma once

#include "attention/cuda/backward_fetch.cuh"
#include "attention/cuda/rows.cuh"
#include "common/cuda/barrier.cuh"
#include "common/cuda/wgmma.cuh"

namespace inlay::attention::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// From products of q and k to exponents of 2, and the slope of that.
template <bool kCapped>
struct BackwardScale {
  float factor, inner, inverse;  // exponent = factor * x, or capped factor * tanh(inner * x); 1 / factor

  __device__ explicit BackwardScale(const Inputs& in) {
    const float scale = static_cast<float>(in.scale), cap = static_cast<float>(in.softcap);
    factor = kLog2E * (kCapped ? cap : scale);
    inner = scale / cap;
    inverse = 1.0f / factor;
  }
};

// Rows of a tile from `first_row` on become zero: whatever they held, nothing is to come of it. By 256 threads.
template <class Layout>
__device__ __forceinline__ void clear_rows(uint32_t tile, int first_row) {
  constexpr int kPanels = Layout::kBytes / Layout::kPanelBytes;
  const int pieces = (Layout::kRows - first_row) * 8;
#pragma unroll 1
  for (int i = threadIdx.x - 128; i < pieces * kPanels; i += 256) {
    store_shared(tile + i / pieces * Layout::kPanelBytes + first_row * 128 + i % pieces * 16, uint4{0, 0, 0, 0});
  }
}

// Loads that the compiler does not move ahead of waits: registers are short.
__device__ __forceinline__ float2 load_pair(uint32_t shared) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(shared) : "memory");
  return pair;
}

// The two groups meet.
__device__ __forceinline__ void meet_both() { meet_at(1, 256); }

// Adds to columns of dq, whoever else does so.
template <int kTiles>
__device__ __forceinline__ void add_to_global(float* to, const Accumulator (&dq)[kTiles]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to + i * 512), "f"(dq[i][0]),
                 "f"(dq[i][1]), "f"(dq[i][2]), "f"(dq[i][3])
                 : "memory");
  }
}

// Hands columns of dq to the warp that adds them to those of other blocks.
template <int kTiles>
__device__ __forceinline__ void hand_sums_over(SumControl& control, uint32_t place, const Accumulator (&dq)[kTiles],
                                               int tile, int phase) {
  wait_at(control.free, phase ^ 1);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    store_shared(place + (i * 128 + threadIdx.x % 128) * 16,
                 uint4{__float_as_uint(dq[i][0]), __float_as_uint(dq[i][1]), __float_as_uint(dq[i][2]),
                       __float_as_uint(dq[i][3])});
  }
  if (threadIdx.x % 128 == 0) control.tile = tile;
  publish_shared();
  arrive_as_warp(control.full);
}

// One thread adds what a group hands over, in any order.
template <class C>
__device__ __forceinline__ void add_sums(const BackwardArguments& arguments, SumControl& control, uint32_t place,
                                         int group) {
  for (int phase = 0;; phase ^= 1) {
    wait_at(control.full, phase);
    const int tile = control.tile;
    if (tile < 0) return;
    const int64_t half = int64_t{tile} * 2 + group;
    float* const to = arguments.dq + half * (C::kUse.dq_floats() / 2);
    start_bulk_add(to, place, C::kSumBytes);
    wait_for_stores();
    arrive(control.free);
  }
}

template <typename T, int kTiles>
__device__ __forceinline__ void store_key_rows(const OutputTensor& out, const Inputs& in, const KeyTileInfo& info,
                                               int own_row, int64_t columns, const Accumulator (&values)[kTiles],
                                               float multiplier) {
  T* rows[2];
  bool there[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t token = int64_t{info.batch} * in.keys.tokens + info.key_row + own_row + 8 * r;
    rows[r] = static_cast<T*>(out.data) + (token * in.key_heads + info.key_head) * columns;
    there[r] = own_row + 8 * r < info.row_count;
  }
  store_rows<T>(rows, there, static_cast<int>(columns), values, {multiplier, multiplier});
}

// Where a thread's columns of a tile of queries, 2 of each 8, have their values: in the order of the columns.
struct OwnColumns {
  uint32_t log_scales, deltas, seen;

  template <int kQueries>
  __device__ explicit OwnColumns(const QueryRows<kQueries>& rows) {
    const int own = threadIdx.x % 4 * 2;
    log_scales = shared_address(rows.log_scales) + own * 4;
    deltas = shared_address(rows.deltas) + own * 4;
    seen = shared_address(rows.seen) + own * 8;
  }
};

// Products of keys and queries, with keys as rows, become probabilities.
template <bool kCapped, int kTiles>
__device__ __forceinline__ void find_probabilities(Accumulator (&s)[kTiles], const BackwardScale<kCapped>& scale,
                                                   const OwnColumns& columns, bool hidden, int own_row) {
  if constexpr (kCapped) {
#pragma unroll
    for (Accumulator& c : s) {
#pragma unroll
      for (float& x : c) {
        x *= scale.inner;
        asm volatile("tanh.approx.f32 %0, %0;" : "+f"(x));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const float2 log_scale = load_pair(columns.log_scales + i * 32);
    s[i][0] = exp2_fast(fmaf(s[i][0], scale.factor, log_scale.x));
    s[i][1] = exp2_fast(fmaf(s[i][1], scale.factor, log_scale.y));
    s[i][2] = exp2_fast(fmaf(s[i][2], scale.factor, log_scale.x));
    s[i][3] = exp2_fast(fmaf(s[i][3], scale.factor, log_scale.y));
  }
  if (!hidden) return;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const uint4 seen = load_shared(columns.seen + i * 64);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int key = own_row + 8 * r;
      if (key < static_cast<int>(seen.x) || key >= static_cast<int>(seen.y)) s[i][2 * r] = 0.0f;
      if (key < static_cast<int>(seen.z) || key >= static_cast<int>(seen.w)) s[i][2 * r + 1] = 0.0f;
    }
  }
}

// dp becomes what probabilities are multiplied by: dS = P (dP - delta), times the softcap's slope. That comes from the
// probability: there are no registers for what it was the power of.
template <bool kCapped, int kTiles>
__device__ __forceinline__ void find_slopes(Accumulator (&dp)[kTiles], const Accumulator (&p)[kTiles],
                                            const BackwardScale<kCapped>& scale, const OwnColumns& columns) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const float2 delta = load_pair(columns.deltas + i * 32);
    dp[i][0] -= delta.x;
    dp[i][1] -= delta.y;
    dp[i][2] -= delta.x;
    dp[i][3] -= delta.y;
  }
  if constexpr (kCapped) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const float2 log_scale = load_pair(columns.log_scales + i * 32);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float x = (__log2f(p[i][j]) - (j % 2 ? log_scale.y : log_scale.x)) * scale.inverse;
        dp[i][j] *= 1.0f - fminf(x * x, 1.0f);
      }
    }
  }
}

// c = a tile's rows, of which `rows` is the first, times the transpose of another's.
template <typename T, int kSteps, class RowTile, class ColumnTile, int kTiles>
__device__ __forceinline__ void start_scores(Accumulator (&c)[kTiles], uint64_t rows, uint64_t columns) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    start_product_of<T, kTiles, false, false>(c, advance(rows, step / 4 * RowTile::kPanelBytes + step % 4 * 32),
                                              advance(columns, step / 4 * ColumnTile::kPanelBytes + step % 4 * 32),
                                              step != 0);
  }
  commit_products();
}

// c += what a thread has of 64 rows, times a tile.
template <typename T, int kSteps, int kTiles>
__device__ __forceinline__ void start_gradients(Accumulator (&c)[kTiles], const Fragment (&rows)[kSteps],
                                                uint64_t tile) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    start_product_of<T, kTiles, true>(c, rows[step], advance(tile, step * 2048), 1);
  }
  commit_products();
}

// c = 64 columns of dS', transposed, times columns of k.
template <typename T, int kSteps, int kTiles>
__device__ __forceinline__ void start_query_gradients(Accumulator (&c)[kTiles], uint64_t scores, uint64_t keys) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    start_product_of<T, kTiles, true, true>(c, advance(scores, step * 2048), advance(keys, step * 2048), step != 0);
  }
  commit_products();
}

template <int kTiles>
__device__ __forceinline__ void clear(Accumulator (&c)[kTiles]) {
#pragma unroll
  for (Accumulator& values : c) values[0] = values[1] = values[2] = values[3] = 0.0f;
}

// Keys that are none come to nothing; both groups call it.
template <class C>
__device__ __forceinline__ void wait_for_keys(BackwardControl<C>& control, uint32_t shared, int clear_from) {
  wait_at(control.keys_full, 0);
  if (clear_from == C::kKeys) return;
  clear_rows<typename C::KeyTile>(shared, clear_from);
  clear_rows<typename C::ValueTile>(shared + C::kValuesAt, clear_from);
  publish_shared();
  meet_both();
}

// Likewise for a tile of queries. Its number; what else there is to know is read where it is needed.
template <class C>
__device__ __forceinline__ int wait_for_queries(BackwardControl<C>& control, uint32_t shared,
                                                const RingPlace<C::kStages>& slot) {
  wait_at(control.full[slot.index], slot.parity);
  const QueryTileInfo& tile = control.rows[slot.index].info;
  if (tile.tile >= 0 && tile.clear_from < C::kQueries) {
    const uint32_t to = shared + C::kSlotsAt + slot.index * C::kSlotBytes;
    clear_rows<typename C::QueryTile>(to, tile.clear_from);
    clear_rows<typename C::ResultTile>(to + C::QueryTile::kBytes, tile.clear_from);
    publish_shared();
    meet_both();
  }
  return tile.tile;
}

#endif

}  // namespace inlay::attention::cuda
