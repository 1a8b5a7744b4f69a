// What the forward's blocks keep in shared memory, and the warps that fill it; forward.cuh says how they work together.
#pragma once

#include "attention/cuda/config.h"
#include "attention/cuda/rings.cuh"
#include "attention/cuda/tiles.cuh"
#include "attention/params.h"
#include "common/cuda/tensor_map.cuh"
#include "common/cuda/tile.cuh"

namespace inlay::attention::cuda {

struct ForwardArguments {
  CUtensorMap q, k, v;
  ForwardParams params;
  TileOrder order;
};

template <typename T_, int kShape>
struct ForwardConfig {
  using T = T_;
  static constexpr ForwardShape kUse = kForwardShapes[kShape];
  static constexpr int kQueries = kUse.queries(), kKeys = kUse.keys, kGroups = kUse.groups;
  static constexpr int kKeyStages = kUse.key_stages, kValueStages = kUse.value_stages;
  static constexpr int kQueryStages = kUse.query_stages;
  static constexpr int kThreads = kUse.threads();
  static constexpr int kKeyTiles = kKeys / 8, kValueTiles = kUse.value_dim / 8;  // of accumulators
  static constexpr int kDepthSteps = kUse.head_dim / 16, kKeySteps = kKeys / 16;
  static_assert(kUse.head_dim % 16 == 0 && kUse.value_dim % 8 == 0 && kKeys % 16 == 0);

  using QueryTile = inlay::cuda::Tile<T, kQueries, kUse.head_dim>;
  using KeyTile = inlay::cuda::Tile<T, kKeys, kUse.head_dim>;
  using ValueTile = inlay::cuda::Tile<T, kKeys, kUse.value_dim>;
  static constexpr int kDepthPanels = (kUse.head_dim + 63) / 64, kValuePanels = (kUse.value_dim + 63) / 64;
  static constexpr int kKeysAt = kQueryStages * QueryTile::kBytes, kValuesAt = kKeysAt + kKeyStages * KeyTile::kBytes;
  static constexpr int kControlAt = kValuesAt + kValueStages * ValueTile::kBytes;
  static_assert(KeyTile::kPanelBytes % 1024 == 0);
};

constexpr int kTileSlots = 2;

template <class C>
struct ForwardControl {
  using Barrier = inlay::cuda::Barrier;
  Barrier q_full[C::kQueryStages], q_free[C::kQueryStages];
  Barrier k_full[C::kKeyStages], k_free[C::kKeyStages], v_full[C::kValueStages], v_free[C::kValueStages];
  Barrier tile_full[kTileSlots], tile_free[kTileSlots];
  TileInfo tiles[kTileSlots];
};

// At most 227 KiB.
template <class C>
constexpr int kForwardSharedBytes = C::kControlAt + static_cast<int>(sizeof(ForwardControl<C>));

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

using namespace inlay::cuda;

// Takes tiles and publishes them; a whole warp.
template <class C>
__device__ void take_tiles(const ForwardArguments& arguments, ForwardControl<C>& control) {
  RingPlace<kTileSlots> place;
  const bool leader = threadIdx.x % 32 == 0;
  for (uint32_t number = blockIdx.x;;) {
    TileInfo info{};
    const bool any = number < arguments.order.count;
    if (any) info = describe_tile<C::kQueries, C::kKeys>(arguments.params.inputs, arguments.order, number);
    if (any && info.query_count == 0) {  // numbers without a tile, between packed sequences
      number = next_tile(arguments.order, number);
      continue;
    }
    wait_patiently(control.tile_free[place.index], place.parity ^ 1);
    if (leader) {
      control.tiles[place.index] = info;
      arrive(control.tile_full[place.index]);
    }
    __syncwarp();
    if (!any) return;
    place.step();
    number = next_tile(arguments.order, number);
  }
}

// Calls use(a tile) for all tiles that have keys; one thread.
template <class C, class Use>
__device__ __forceinline__ void for_tiles(ForwardControl<C>& control, Use use) {
  for (RingPlace<kTileSlots> tile;; tile.step()) {
    wait_at(control.tile_full[tile.index], tile.parity);
    const TileInfo info = control.tiles[tile.index];
    arrive(control.tile_free[tile.index]);
    if (info.query_count == 0) return;
    if (info.first_block != info.end_block) use(info);
  }
}

template <class C>
__device__ void fetch_queries_and_keys(const ForwardArguments& arguments, ForwardControl<C>& control, uint32_t shared) {
  RingPlace<C::kQueryStages> q;
  RingPlace<C::kKeyStages> k;
  for_tiles<C>(control, [&](const TileInfo& info) {
    wait_at(control.q_free[q.index], q.parity ^ 1);
    fetch_panels(shared + q.index * C::QueryTile::kBytes, C::kDepthPanels, C::QueryTile::kPanelBytes, arguments.q,
                 info.query_row, info.head, info.batch, control.q_full[q.index]);
    q.step();
#pragma unroll 1
    for (int block = info.end_block - 1; block >= info.first_block; --block) {
      wait_at(control.k_free[k.index], k.parity ^ 1);
      fetch_panels(shared + C::kKeysAt + k.index * C::KeyTile::kBytes, C::kDepthPanels, C::KeyTile::kPanelBytes,
                   arguments.k, info.key_row + block * C::kKeys, info.key_head, info.batch, control.k_full[k.index]);
      k.step();
    }
  });
}

template <class C>
__device__ void fetch_values(const ForwardArguments& arguments, ForwardControl<C>& control, uint32_t shared) {
  RingPlace<C::kValueStages> v;
  for_tiles<C>(control, [&](const TileInfo& info) {
#pragma unroll 1
    for (int block = info.end_block - 1; block >= info.first_block; --block) {
      wait_at(control.v_free[v.index], v.parity ^ 1);
      fetch_panels(shared + C::kValuesAt + v.index * C::ValueTile::kBytes, C::kValuePanels, C::ValueTile::kPanelBytes,
                   arguments.v, info.key_row + block * C::kKeys, info.key_head, info.batch, control.v_full[v.index]);
      v.step();
    }
  });
}

#endif

}  // namespace inlay::attention::cuda
