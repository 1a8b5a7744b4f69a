// What the backward's blocks keep in shared memory, and the warp that fills it; backward.cuh says how it is used.
#pragma once

#include "attention/cuda/config.h"
#include "attention/cuda/key_tiles.cuh"
#include "attention/cuda/rings.cuh"
#include "common/cuda/tile.cuh"

namespace inlay::attention::cuda {

struct BackwardArguments {
  CUtensorMap q, k, v, dout;
  BackwardParams params;
  KeyTileOrder order;
  // Of BackwardScratch.
  const float* log_scales;
  const float* deltas;
  float* dq;
  unsigned* turns;
  int query_tiles;  // of one head
};

template <typename T_, int kShape>
struct BackwardConfig {
  using T = T_;
  static constexpr BackwardShape kUse = kBackwardShapes[kShape];
  static constexpr int kQueries = kUse.queries, kKeys = kUse.keys, kStages = kUse.stages;
  static constexpr int kGroups = 2, kThreads = (kGroups + 1) * 128;
  static constexpr int kQueryTiles = kQueries / 8, kDepthTiles = kUse.head_dim / 8, kValueTiles = kUse.value_dim / 8;
  static constexpr int kDepthSteps = kUse.head_dim / 16, kValueSteps = kUse.value_dim / 16;
  static constexpr int kQuerySteps = kQueries / 16, kKeySteps = kKeys / 16;

  using QueryTile = inlay::cuda::Tile<T, kQueries, kUse.head_dim>;
  using ResultTile = inlay::cuda::Tile<T, kQueries, kUse.value_dim>;
  using KeyTile = inlay::cuda::Tile<T, kKeys, kUse.head_dim>;
  using ValueTile = inlay::cuda::Tile<T, kKeys, kUse.value_dim>;
  using ScoreTile = inlay::cuda::Tile<T, kKeys, kQueries>;  // of dS, transposed
  static constexpr int kDepthPanels = (kUse.head_dim + 63) / 64, kValuePanels = (kUse.value_dim + 63) / 64;

  static constexpr int kValuesAt = KeyTile::kBytes, kSlotsAt = kValuesAt + ValueTile::kBytes;
  static constexpr int kSlotBytes = QueryTile::kBytes + ResultTile::kBytes;
  static constexpr int kScoresAt = kSlotsAt + kStages * kSlotBytes;
  static constexpr int kProbabilitiesAt = kScoresAt + 2 * ScoreTile::kBytes;  // from one group to the other
  static constexpr int kSumsAt = kProbabilitiesAt + (kKeys == 64 ? 2 * ScoreTile::kBytes : 0);
  static constexpr int kSumBytes = kKeys == 64 ? 0 : kUse.half_columns() * 64 * 4;  // of each group, on the way to dq
  static constexpr int kControlAt = kSumsAt + kGroups * kSumBytes;
};

// A tile of queries that has come.
struct QueryTileInfo {
  int tile;        // of dq, among all; negative: no more come
  int hidden;      // some query does not see some key
  int clear_from;  // rows from here on are not of the sequence, and may hold anything
};

template <int kQueries>
struct alignas(16) QueryRows {
  float log_scales[kQueries], deltas[kQueries];
  int2 seen[kQueries];  // keys, from and to, counted from the block's first one; only if some are hidden
  QueryTileInfo info;
};

// Of one group's columns of dq on the way to global memory: what tile they are of.
struct SumControl {
  inlay::cuda::Barrier full, free;
  int tile;
};

template <class C>
struct BackwardControl {
  using Barrier = inlay::cuda::Barrier;
  KeyTileInfo info;
  QueryRows<C::kQueries> rows[C::kStages];
  Barrier keys_full, full[C::kStages], free[C::kStages];
  SumControl sums[C::kGroups];
  Barrier probabilities_full[2], scores_full[2];  // of the two groups of 64 keys
};

// At most 227 KiB.
template <class C>
constexpr int kBackwardSharedBytes = C::kControlAt + static_cast<int>(sizeof(BackwardControl<C>));

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Fetches all that the block works on; a whole warp.
template <class C>
__device__ void fetch_for_key_tile(const BackwardArguments& arguments, BackwardControl<C>& control, uint32_t shared,
                                   const KeyTileInfo info) {
  const Inputs& in = arguments.params.inputs;
  const int lane = threadIdx.x % 32, group = static_cast<int>(in.group());
  if (lane == 0) {
    // Both at one barrier, of which expect_bytes() is the arrival.
    expect_bytes(control.keys_full, C::KeyTile::kBytes + C::ValueTile::kBytes, 0);
    for (int i = 0; i < C::kDepthPanels; ++i) {
      fetch_box(shared + i * C::KeyTile::kPanelBytes, arguments.k, i * 64, info.key_row, info.key_head, info.batch,
                control.keys_full);
    }
    for (int i = 0; i < C::kValuePanels; ++i) {
      fetch_box(shared + C::kValuesAt + i * C::ValueTile::kPanelBytes, arguments.v, i * 64, info.key_row, info.key_head,
                info.batch, control.keys_full);
    }
  }
  RingPlace<C::kStages> slot;
  constexpr int kOwn = C::kQueries / 32;  // rows of a lane
  for (int i = 0; i < group; ++i) {
    const int head = info.key_head * group + i;
    const int64_t row_values = (int64_t{info.batch} * in.query_heads + head) * in.queries.tokens + info.query_row;
    const int first_dq = (info.batch * static_cast<int>(in.query_heads) + head) * arguments.query_tiles;
    for (int tile = info.first_tile; tile < info.end_tile; ++tile) {
      float log_scales[kOwn], deltas[kOwn];
      int2 seen[kOwn];
      bool any = false, all = true;
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const int query = tile * C::kQueries + j * 32 + lane;
        const bool there = query < info.query_count;
        log_scales[j] = there ? arguments.log_scales[row_values + query] : -INFINITY;
        deltas[j] = there ? arguments.deltas[row_values + query] : 0.0f;
        seen[j] = int2{0, 0};
        if (there) {
          const KeyRange keys =
              in.visible(query, info.key_count, info.diagonal, info.batch, int64_t{info.query_row} + query);
          const int begin = static_cast<int>(max(keys.begin - info.first_key, int64_t{0}));
          const int end = static_cast<int>(min(keys.end - info.first_key, int64_t{C::kKeys}));
          any |= begin < end;
          all &= begin == 0 && end == C::kKeys;
          seen[j] = int2{begin, end};
        }
      }
      // Those that add to dq in turn do not pass any tile by.
      if (!__any_sync(0xffffffffu, any) && !arguments.turns) continue;
      all = __all_sync(0xffffffffu, all);

      wait_patiently(control.free[slot.index], slot.parity ^ 1);
      auto& rows = control.rows[slot.index];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        rows.log_scales[j * 32 + lane] = log_scales[j];
        rows.deltas[j * 32 + lane] = deltas[j];
        if (!all) rows.seen[j * 32 + lane] = seen[j];
      }
      if (lane == 0) {
        const int first = tile * C::kQueries, token = info.query_row + first, count = info.query_count - first;
        rows.info = {
            first_dq + info.first_query_tile + tile, !all,
            count < C::kQueries && info.query_row + info.query_count < in.queries.tokens ? count : C::kQueries};
        const uint32_t to = shared + C::kSlotsAt + slot.index * C::kSlotBytes;
        Barrier& full = control.full[slot.index];
        expect_bytes(full, C::kSlotBytes, 0);
        for (int panel = 0; panel < C::kDepthPanels; ++panel) {
          fetch_box(to + panel * C::QueryTile::kPanelBytes, arguments.q, panel * 64, token, head, info.batch, full);
        }
        for (int panel = 0; panel < C::kValuePanels; ++panel) {
          fetch_box(to + C::QueryTile::kBytes + panel * C::ResultTile::kPanelBytes, arguments.dout, panel * 64, token,
                    head, info.batch, full);
        }
      }
      arrive_as_warp(control.full[slot.index]);
      slot.step();
    }
  }
  wait_patiently(control.free[slot.index], slot.parity ^ 1);
  if (lane == 0) {
    control.rows[slot.index].info.tile = -1;
    arrive(control.full[slot.index]);
  }
  arrive_as_warp(control.full[slot.index]);
}

#endif

}  // namespace inlay::attention::cuda
