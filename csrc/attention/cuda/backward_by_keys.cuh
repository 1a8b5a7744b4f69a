// The backward's warpgroups for rows that are at most 128 wide: each has dk and dv of 64 of the block's 128 keys.
//
// P' and dS' go from registers to registers. dS' is also written to shared memory, where both groups read all of it for
// half of dq. While a group computes, the tensor cores have products of both to do: those of the next tile are asked
// for before the last of this one are waited for.
#pragma once

#include "attention/cuda/backward_steps.cuh"

namespace inlay::attention::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <class C>
__device__ __forceinline__ void compute_half_of_keys(const BackwardArguments& arguments, BackwardControl<C>& control,
                                                     uint32_t shared, const KeyTileInfo& info, int group) {
  using T = typename C::T;
  const Inputs& in = arguments.params.inputs;
  const int lane = threadIdx.x % 32;
  const int first_row = group * 64 + threadIdx.x / 32 % 4 * 16, own_row = first_row + lane / 4;  // and the eighth after
  Accumulator dk[C::kDepthTiles], dv[C::kValueTiles];
  clear(dk);
  clear(dv);

  if (info.first_tile < info.end_tile) {
    const BackwardScale<C::kUse.capped> scale(in);
    const uint64_t own_keys = matrix_descriptor(shared + group * 64 * 128, C::KeyTile::kPanelBytes);
    const uint64_t own_values = matrix_descriptor(shared + C::kValuesAt + group * 64 * 128, C::ValueTile::kPanelBytes);
    const uint64_t first_queries = matrix_descriptor(shared + C::kSlotsAt, C::QueryTile::kPanelBytes);
    const uint64_t first_results =
        matrix_descriptor(shared + C::kSlotsAt + C::QueryTile::kBytes, C::ResultTile::kPanelBytes);
    // This group's half of dq: its columns of k, or its columns of dS'.
    constexpr bool kByColumns = C::kUse.halves_are_columns();
    static_assert(C::kUse.half_columns() == 64);
    const uint64_t half_keys =
        matrix_descriptor(shared + (kByColumns ? group * C::KeyTile::kPanelBytes : 0), C::KeyTile::kPanelBytes);
    const uint64_t half_scores = matrix_descriptor(
        shared + C::kScoresAt + (kByColumns ? 0 : group * C::ScoreTile::kPanelBytes), C::ScoreTile::kPanelBytes);
    const uint64_t own_scores = matrix_descriptor(shared + C::kScoresAt + group * 64 * 128, C::ScoreTile::kPanelBytes);
    const uint32_t sums = shared + C::kSumsAt + group * C::kSumBytes;

    wait_for_keys(control, shared, info.clear_from);
    RingPlace<C::kStages> slot;
    int last_slot = -1, buffer = 0;
    const auto start_key_gradients = [&] {
      const uint64_t queries = advance(first_queries, slot.index * C::kSlotBytes);
      const uint64_t scores = advance(own_scores, buffer * C::ScoreTile::kBytes);
#pragma unroll
      for (int step = 0; step < C::kQuerySteps; ++step) {
        start_product_of<T, C::kDepthTiles, false, true>(
            dk, advance(scores, step / 4 * C::ScoreTile::kPanelBytes + step % 4 * 32), advance(queries, step * 2048),
            1);
      }
      commit_products();
    };

#pragma unroll 1
    for (;;) {
      const int tile = wait_for_queries(control, shared, slot);
      if (tile < 0) break;
      const OwnColumns columns(control.rows[slot.index]);
      const uint64_t results = advance(first_results, slot.index * C::kSlotBytes);
      Accumulator s[C::kQueryTiles], dp[C::kQueryTiles];
      begin_products();
      start_scores<T, C::kDepthSteps, typename C::KeyTile, typename C::QueryTile>(
          s, own_keys, advance(first_queries, slot.index * C::kSlotBytes));
      start_scores<T, C::kValueSteps, typename C::ValueTile, typename C::ResultTile>(dp, own_values, results);
      wait_for_products<1>();  // s, and the last tile's dk
      keep(s);
      if (last_slot >= 0 && lane == 0) arrive(control.free[last_slot]);
      last_slot = slot.index;
      find_probabilities(s, scale, columns, control.rows[slot.index].info.hidden, own_row);
      wait_for_products<0>();  // dp
      keep(dp);
      find_slopes(dp, s, scale, columns);
      Fragment p[C::kQuerySteps], ds[C::kQuerySteps];
#pragma unroll
      for (int i = 0; i < C::kQueryTiles; ++i) {
        p[i / 2][i % 2 * 2] = pack_pair<T>(s[i][0], s[i][1]);
        p[i / 2][i % 2 * 2 + 1] = pack_pair<T>(s[i][2], s[i][3]);
        ds[i / 2][i % 2 * 2] = pack_pair<T>(s[i][0] * dp[i][0], s[i][1] * dp[i][1]);
        ds[i / 2][i % 2 * 2 + 1] = pack_pair<T>(s[i][2] * dp[i][2], s[i][3] * dp[i][3]);
      }
      begin_products();
      start_gradients<T>(dv, p, results);
      const TileView<T, C::kKeys, C::kQueries> scores{shared + C::kScoresAt + buffer * C::ScoreTile::kBytes};
#pragma unroll
      for (int step = 0; step < C::kQuerySteps; ++step) scores.store_rows_first(ds[step], first_row, step * 16);
      publish_shared();
      // All of dS' is there; and, as nobody comes here before its last product with the other buffer, that is free.
      meet_both();

      Accumulator dq[C::kUse.half_columns() / 8];
      begin_products();
      start_query_gradients<T, C::kKeySteps>(dq, advance(half_scores, buffer * C::ScoreTile::kBytes), half_keys);
      start_key_gradients();
      wait_for_products<1>();  // dv and dq
      keep(dq);
      hand_sums_over(control.sums[group], sums, dq, control.rows[slot.index].info.tile, buffer);
      buffer ^= 1;
      slot.step();
    }
    wait_for_products<0>();
    keep(dk);
    keep(dv);
    wait_at(control.sums[group].free, buffer ^ 1);
    if (threadIdx.x % 128 == 0) control.sums[group].tile = -1;
    arrive_as_warp(control.sums[group].full);
  }
  store_key_rows<T>(arguments.params.dk, in, info, own_row, in.head_dim, dk, static_cast<float>(in.scale));
  store_key_rows<T>(arguments.params.dv, in, info, own_row, in.value_dim, dv, 1.0f);
}

#endif

}  // namespace inlay::attention::cuda
