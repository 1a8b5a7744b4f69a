// The backward's warpgroups for rows that are more than 128 wide: one has dv of the block's 64 keys, the other dk.
//
// The first computes S' and P' and hands P' over, rounded; the second computes dP' and dS' and hands that over. Each
// has half of dq's columns, 64 at a time. Either asks for the products of its next tile before it waits for those of
// this one.
#pragma once

#include "attention/cuda/backward_steps.cuh"

namespace inlay::attention::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// P' as registers lie, in shared memory: a thread of one group has the places of a thread of the other.
template <int kSteps>
__device__ __forceinline__ void hand_over(uint32_t to, const Fragment (&p)[kSteps]) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    store_shared(to + (step * 128 + threadIdx.x % 128) * 16, uint4{p[step][0], p[step][1], p[step][2], p[step][3]});
  }
}
template <typename T, int kSteps, int kTiles>
__device__ __forceinline__ void take_over(Accumulator (&p)[kTiles], uint32_t from) {
  static_assert(kTiles == 2 * kSteps);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const uint4 words = load_shared(from + (step * 128 + threadIdx.x % 128) * 16);
    unpack_pair<T>(words.x, p[2 * step][0], p[2 * step][1]);
    unpack_pair<T>(words.y, p[2 * step][2], p[2 * step][3]);
    unpack_pair<T>(words.z, p[2 * step + 1][0], p[2 * step + 1][1]);
    unpack_pair<T>(words.w, p[2 * step + 1][2], p[2 * step + 1][3]);
  }
}

// One group's half of dq: up to two panels of 64 columns, one after the other.
template <class C, int kGroup>
struct QueryGradients {
  static constexpr int kPanels = C::kDepthPanels - 2 * kGroup < 2 ? C::kDepthPanels - 2 * kGroup : 2;
  static_assert(kPanels > 0 && C::kUse.half_columns() == 128);

  const BackwardArguments& arguments;
  uint64_t keys, scores;
  float* own;
  Accumulator dq[8];
  float* to = nullptr;
  SumControl& control;  // where tiles of keys add in turn
  uint32_t phase = 0;

  __device__ __forceinline__ QueryGradients(const BackwardArguments& given, SumControl& sums, uint32_t shared)
      : arguments(given), control(sums) {
    keys = matrix_descriptor(shared + 2 * kGroup * C::KeyTile::kPanelBytes, C::KeyTile::kPanelBytes);
    scores = matrix_descriptor(shared + C::kScoresAt, C::ScoreTile::kPanelBytes);
    own = given.dq + (kGroup * C::kUse.dq_floats() / 2 + static_cast<int>(threadIdx.x % 128) * 4);
  }

  // All products under way are done afterwards but those of the second panel.
  __device__ __forceinline__ void add_first(int tile, int buffer) {
    using T = typename C::T;
    begin_products();
    start_query_gradients<T, C::kKeySteps>(dq, advance(scores, buffer * C::ScoreTile::kBytes), keys);
    wait_for_products<0>();
    keep(dq);
    to = own + int64_t{tile} * C::kUse.dq_floats();
    if (arguments.turns) {
      wait_at(control.free, phase);
      phase ^= 1;
    }
    add_to_global(to, dq);
    if constexpr (kPanels == 2) {
      begin_products();
      start_query_gradients<T, C::kKeySteps>(dq, advance(scores, buffer * C::ScoreTile::kBytes),
                                             advance(keys, C::KeyTile::kPanelBytes));
    }
  }
  __device__ __forceinline__ void add_second() {
    if constexpr (kPanels == 2) {
      wait_for_products<0>();
      keep(dq);
      add_to_global(to + 8 * 512, dq);
    }
    if (arguments.turns) arrive_as_warp(control.full);
  }
};

template <class C>
__device__ __forceinline__ void compute_value_gradients(const BackwardArguments& arguments, BackwardControl<C>& control,
                                                        uint32_t shared, const KeyTileInfo& info) {
  using T = typename C::T;
  const Inputs& in = arguments.params.inputs;
  const int lane = threadIdx.x % 32, own_row = threadIdx.x / 32 % 4 * 16 + lane / 4;
  Accumulator dv[C::kValueTiles];
  clear(dv);
  if (info.first_tile < info.end_tile) {
    const BackwardScale<C::kUse.capped> scale(in);
    const uint64_t keys = matrix_descriptor(shared, C::KeyTile::kPanelBytes);
    const uint64_t first_queries = matrix_descriptor(shared + C::kSlotsAt, C::QueryTile::kPanelBytes);
    const uint64_t first_results =
        matrix_descriptor(shared + C::kSlotsAt + C::QueryTile::kBytes, C::ResultTile::kPanelBytes);
    QueryGradients<C, 0> dq(arguments, control.sums[0], shared);
    wait_for_keys(control, shared, info.clear_from);
    RingPlace<C::kStages> slot;
    RingPlace<2> buffer;
    Accumulator s[C::kQueryTiles];
    const auto start_next = [&] {
      const int tile = wait_for_queries(control, shared, slot);
      if (tile >= 0) {
        begin_products();
        start_scores<T, C::kDepthSteps, typename C::KeyTile, typename C::QueryTile>(
            s, keys, advance(first_queries, slot.index * C::kSlotBytes));
      }
      return tile;
    };
    int tile = start_next();
    wait_for_products<0>();
    bool first = true;
#pragma unroll 1
    while (tile >= 0) {
      keep(s);
      find_probabilities(s, scale, OwnColumns(control.rows[slot.index]), control.rows[slot.index].info.hidden, own_row);
      Fragment p[C::kQuerySteps];
      pack_steps<T>(p, s);
      hand_over(shared + C::kProbabilitiesAt + buffer.index * C::ScoreTile::kBytes, p);
      if (!first) dq.add_second();  // of the last tile
      first = false;
      arrive_as_warp(control.probabilities_full[buffer.index]);
      begin_products();
      start_gradients<T>(dv, p, advance(first_results, slot.index * C::kSlotBytes));
      const int used = slot.index;
      slot.step();
      const int next = start_next();
      wait_at(control.scores_full[buffer.index], buffer.parity);
      dq.add_first(tile, buffer.index);
      if (lane == 0) arrive(control.free[used]);
      buffer.step();
      tile = next;
    }
    if (!first) dq.add_second();
    keep(dv);
  }
  store_key_rows<T>(arguments.params.dv, in, info, own_row, in.value_dim, dv, 1.0f);
}

template <class C>
__device__ __forceinline__ void compute_key_gradients(const BackwardArguments& arguments, BackwardControl<C>& control,
                                                      uint32_t shared, const KeyTileInfo& info) {
  using T = typename C::T;
  const Inputs& in = arguments.params.inputs;
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 % 4 * 16, own_row = first_row + lane / 4;
  Accumulator dk[C::kDepthTiles];
  clear(dk);
  if (info.first_tile < info.end_tile) {
    const BackwardScale<C::kUse.capped> scale(in);
    const uint64_t values = matrix_descriptor(shared + C::kValuesAt, C::ValueTile::kPanelBytes);
    const uint64_t first_queries = matrix_descriptor(shared + C::kSlotsAt, C::QueryTile::kPanelBytes);
    const uint64_t first_results =
        matrix_descriptor(shared + C::kSlotsAt + C::QueryTile::kBytes, C::ResultTile::kPanelBytes);
    QueryGradients<C, 1> dq(arguments, control.sums[1], shared);
    wait_for_keys(control, shared, info.clear_from);
    RingPlace<C::kStages> slot;
    RingPlace<2> buffer;
    Accumulator dp[C::kQueryTiles];
    const auto start_next = [&] {
      const int tile = wait_for_queries(control, shared, slot);
      if (tile >= 0) {
        begin_products();
        start_scores<T, C::kValueSteps, typename C::ValueTile, typename C::ResultTile>(
            dp, values, advance(first_results, slot.index * C::kSlotBytes));
      }
      return tile;
    };
    int tile = start_next();
    wait_for_products<0>();
    bool first = true;
#pragma unroll 1
    while (tile >= 0) {
      keep(dp);
      wait_at(control.probabilities_full[buffer.index], buffer.parity);
      Accumulator p[C::kQueryTiles];
      take_over<T, C::kQuerySteps>(p, shared + C::kProbabilitiesAt + buffer.index * C::ScoreTile::kBytes);
      find_slopes(dp, p, scale, OwnColumns(control.rows[slot.index]));
#pragma unroll
      for (int i = 0; i < C::kQueryTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) dp[i][j] *= p[i][j];
      }
      Fragment ds[C::kQuerySteps];
      pack_steps<T>(ds, dp);
      // The other group was done with this buffer before it handed P' over.
      const TileView<T, C::kKeys, C::kQueries> scores{shared + C::kScoresAt + buffer.index * C::ScoreTile::kBytes};
#pragma unroll
      for (int step = 0; step < C::kQuerySteps; ++step) scores.store_rows_first(ds[step], first_row, step * 16);
      publish_shared();
      arrive_as_warp(control.scores_full[buffer.index]);
      if (!first) dq.add_second();  // of the last tile
      first = false;
      begin_products();
      start_gradients<T>(dk, ds, advance(first_queries, slot.index * C::kSlotBytes));
      const int used = slot.index;
      slot.step();
      const int next = start_next();
      wait_at(control.scores_full[buffer.index], buffer.parity);
      dq.add_first(tile, buffer.index);
      if (lane == 0) arrive(control.free[used]);
      buffer.step();
      tile = next;
    }
    if (!first) dq.add_second();
    keep(dk);
  }
  store_key_rows<T>(arguments.params.dk, in, info, own_row, in.head_dim, dk, static_cast<float>(in.scale));
}

#endif

}  // namespace inlay::attention::cuda
