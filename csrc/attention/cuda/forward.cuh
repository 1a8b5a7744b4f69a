// The forward for 16-bit values on Hopper.
//
// A tile is `queries` queries of one head of one sequence. Blocks stay on the chip and take tile after tile, the
// longest ones first, until none is left. Of a block's warpgroups the first is split: one of its warps takes tiles and
// says what they are (TileInfo), one fetches the tile's q and, key tile by key tile from the last to the first, k, and
// one v. Each of the other warpgroups has 64 of the queries:
//
//   s = q k^T of one tile of keys, m = a score that none exceeds by much, p = 2^(s - m), o = o * 2^(old m - m) + p v
//
// with everything but q, k and v in registers. While a group computes the p of one tile of keys, the tensor cores
// multiply the p of the one before by its v; the groups help each other in the same way. The last p of a tile waits for
// the first s of the next one.
//
// Barriers, each in shared memory: k, v, q and TileInfo come in rings of buffers that are `full` (the copies have come,
// or the one warp has written) and then `free` (all warps that read them have said so).
#pragma once

#include "attention/cuda/fetch.cuh"
#include "attention/cuda/softmax.cuh"
#include "common/cuda/barrier.cuh"
#include "common/cuda/wgmma.cuh"

namespace inlay::attention::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Rows of a tile of v that hold no keys of the sequence count with probability zero, but may be infinite or NaN.
template <class C>
__device__ __forceinline__ void clear_values(uint32_t values, int first_row, int group) {
  const int pieces = (C::kKeys - first_row) * 8 * C::kValuePanels;
#pragma unroll 1
  for (int i = threadIdx.x % 128; i < pieces; i += 128) {
    const int row = first_row + i / (8 * C::kValuePanels), piece = i % (8 * C::kValuePanels);
    store_shared(values + piece / 8 * C::ValueTile::kPanelBytes + row * 128 + piece % 8 * 16, uint4{0, 0, 0, 0});
  }
  publish_shared();
  meet_at(1 + group, 128);
}

// The work of one warpgroup.
template <class C>
__device__ __forceinline__ void compute_tiles(const ForwardArguments& arguments, ForwardControl<C>& control,
                                              uint32_t shared, int group) {
  using T = typename C::T;
  const ForwardParams& params = arguments.params;
  const int lane = threadIdx.x % 32;
  const int own_row = group * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;  // and the eighth after it
  const uint64_t query_descriptor = matrix_descriptor(shared + group * 64 * 128, C::QueryTile::kPanelBytes);
  const uint64_t key_descriptor = matrix_descriptor(shared + C::kKeysAt, C::KeyTile::kPanelBytes);
  const uint64_t value_descriptor = matrix_descriptor(shared + C::kValuesAt, C::ValueTile::kPanelBytes);
  const ScoreScale scale(params.inputs);

  RingPlace<kTileSlots> tile;
  RingPlace<C::kQueryStages> q;
  RingPlace<C::kKeyStages> k;
  RingPlace<C::kValueStages> v;
  Accumulator s[C::kKeyTiles], o[C::kValueTiles];
  Fragment p[C::kKeySteps];
  RowLimits limits;
  int first_full_block = 0, end_full_block = 0;

  // The same for all threads, and known to be.
  const auto block_count = [](const TileInfo& info) {
    return __shfl_sync(0xffffffffu, info.end_block - info.first_block, 0);
  };
  const auto find_blocks = [&](const TileInfo& info) {
    first_full_block = info.first_full_block;
    end_full_block = info.end_full_block;
    return info.end_block - 1;
  };
  const auto say_free = [&](Barrier& barrier) {
    if (lane == 0) arrive(barrier);
  };
  const auto start_scores = [&] {
    const uint64_t queries = advance(query_descriptor, q.index * C::QueryTile::kBytes);
    const uint64_t keys = advance(key_descriptor, k.index * C::KeyTile::kBytes);
#pragma unroll
    for (int step = 0; step < C::kDepthSteps; ++step) {
      start_product_of<T, C::kKeyTiles, false, false>(
          s, advance(queries, step / 4 * C::QueryTile::kPanelBytes + step % 4 * 32),
          advance(keys, step / 4 * C::KeyTile::kPanelBytes + step % 4 * 32), step != 0);
    }
    commit_products();
  };
  const auto start_values = [&] {
    const uint64_t values = advance(value_descriptor, v.index * C::ValueTile::kBytes);
#pragma unroll
    for (int step = 0; step < C::kKeySteps; ++step) {
      start_product_of<T, C::kValueTiles, true>(o, p[step], advance(values, step * 2048), 1);
    }
    commit_products();
  };
  const auto wait_for_turn = [&] {
    if constexpr (C::kUse.in_turns) meet_at(8 + group, 256);
  };
  const auto end_turn = [&] {
    if constexpr (C::kUse.in_turns) arrive_at(8 + (group + 1) % C::kGroups, 256);
  };
  if (group == C::kGroups - 1) end_turn();
  const auto hide_and_scale = [&](int block) {
    if (scale.before) scale.apply(s);
    if (block < first_full_block || block >= end_full_block) limits.hide(s, block * C::kKeys);
  };
  const auto scores_are_read = [&](bool of_last_block) {
    say_free(control.k_free[k.index]);
    k.step();
    if (of_last_block) {
      say_free(control.q_free[q.index]);
      q.step();
    }
  };
  const auto values_are_read = [&] {
    say_free(control.v_free[v.index]);
    v.step();
  };
  const auto clear_result = [&] {
#pragma unroll
    for (Accumulator& c : o) c[0] = c[1] = c[2] = c[3] = 0.0f;
  };
  const auto tile_is_done = [&] {
    __syncwarp();
    say_free(control.tile_free[tile.index]);
    tile.step();
  };

  for (;;) {
    wait_at(control.tile_full[tile.index], tile.parity);
    if (control.tiles[tile.index].query_count == 0) break;
    RowState<T> rows;
    float added[2];
    clear_result();
    int blocks = block_count(control.tiles[tile.index]);
    if (blocks > 0) {
      int block = find_blocks(control.tiles[tile.index]);
      wait_at(control.q_full[q.index], q.parity);
      wait_at(control.k_full[k.index], k.parity);
      wait_for_turn();
      begin_products();
      start_scores();
      end_turn();
      limits.find(params.inputs, control.tiles[tile.index], own_row);
      wait_for_products<0>();
      keep(s);
      scores_are_read(blocks == 1);
      hide_and_scale(block);
      rows.settle(s, scale.factor);
      rows.exponentiate(s, scale.factor, added);
      rows.add(added);
      pack_steps<T>(p, s);

      for (;;) {  // once for each tile that follows without a break
        if (const int from = control.tiles[tile.index].clear_from; from != 0) {
          wait_at(control.v_full[v.index], v.parity);
          clear_values<C>(shared + C::kValuesAt + v.index * C::ValueTile::kBytes, from, group);
        }
        if (blocks > 1) wait_at(control.k_full[k.index], k.parity);

#pragma unroll 1
        for (int left = blocks - 1; left > 0; --left) {
          --block;
          wait_for_turn();
          begin_products();
          start_scores();
          wait_at(control.v_full[v.index], v.parity);
          begin_products();
          start_values();
          end_turn();
          wait_for_products<1>();
          keep(s);
          bool moved = false;
          if constexpr (C::kUse.bold) {
            bool again = false;
            do {
              if (again) {
                recompute_scores<T, C::kKeyTiles>(
                    s, TileView<T, C::kQueries, C::kUse.head_dim>{shared + q.index * C::QueryTile::kBytes},
                    TileView<T, C::kKeys, C::kUse.head_dim>{shared + C::kKeysAt + k.index * C::KeyTile::kBytes},
                    own_row - lane / 4);
              }
              hide_and_scale(block);
              if (again || !rows.settled) moved = rows.settle(s, scale.factor);
              rows.exponentiate(s, scale.factor, added);
              again = !again && rows.out_of_bounds(added);
            } while (again);
            scores_are_read(left == 1);
          } else {
            scores_are_read(left == 1);
            hide_and_scale(block);
            moved = rows.settle(s, scale.factor);
            rows.exponentiate(s, scale.factor, added);
            if (rows.out_of_bounds(added)) __trap();  // never: no score exceeds `top` by much
          }
          rows.add(added);
          if (left > 1) wait_at(control.k_full[k.index], k.parity);  // of the next round
          wait_for_products<0>();
          keep(o);
          values_are_read();
          if (moved) rows.rescale(o);
          pack_steps<T>(p, s);
        }

        // The last product with v, and the first with k of the next tile, which takes no other turn than this.
        auto next = tile;
        next.step();
        wait_at(control.tile_full[next.index], next.parity);
        blocks = control.tiles[next.index].query_count == 0 ? 0 : block_count(control.tiles[next.index]);
        if (blocks == 0) break;
        block = find_blocks(control.tiles[next.index]);
        wait_at(control.q_full[q.index], q.parity);
        wait_at(control.k_full[k.index], k.parity);
        wait_for_turn();
        begin_products();
        start_scores();
        wait_at(control.v_full[v.index], v.parity);
        begin_products();
        start_values();
        end_turn();
        limits.find(params.inputs, control.tiles[next.index], own_row);
        wait_for_products<1>();
        keep(s);
        scores_are_read(blocks == 1);
        hide_and_scale(block);
        const RowState<T> finished = rows;
        rows.restart();
        rows.settle(s, scale.factor);
        rows.exponentiate(s, scale.factor, added);
        if (rows.out_of_bounds(added)) __trap();  // never: no score exceeds `top` any more
        rows.add(added);
        wait_for_products<0>();
        keep(o);
        values_are_read();
        pack_steps<T>(p, s);
        finish_rows<T>(params, control.tiles[tile.index], finished, scale.factor, o, own_row);
        tile_is_done();
        clear_result();
      }
      wait_at(control.v_full[v.index], v.parity);
      begin_products();
      start_values();
      wait_for_products<0>();
      keep(o);
      values_are_read();
    }
    finish_rows<T>(params, control.tiles[tile.index], rows, scale.factor, o, own_row);
    tile_is_done();
  }
}

#endif

template <class C>
__global__ __launch_bounds__(C::kThreads, 1) void forward_kernel(const __grid_constant__ ForwardArguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  char* const memory = dynamic_shared();
  const uint32_t shared = shared_address(memory);
  auto& control = *reinterpret_cast<ForwardControl<C>*>(memory + C::kControlAt);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    constexpr int kReaders = C::kGroups * 4;  // warps
    for (int i = 0; i < C::kQueryStages; ++i) {
      init_barrier(control.q_full[i], 1);
      init_barrier(control.q_free[i], kReaders);
    }
    for (int i = 0; i < C::kKeyStages; ++i) {
      init_barrier(control.k_full[i], 1);
      init_barrier(control.k_free[i], kReaders);
    }
    for (int i = 0; i < C::kValueStages; ++i) {
      init_barrier(control.v_full[i], 1);
      init_barrier(control.v_free[i], kReaders);
    }
    for (int i = 0; i < kTileSlots; ++i) {
      init_barrier(control.tile_full[i], 1);
      init_barrier(control.tile_free[i], kReaders + 2);
    }
    publish_barriers();
  }
  __syncthreads();
  wait_for_predecessor();
  release_successor();
  if (warp < 4) {
    leave_registers<C::kUse.few_registers()>();
    if (warp == 0) take_tiles<C>(arguments, control);
    if (warp == 1 && threadIdx.x % 32 == 0) fetch_queries_and_keys<C>(arguments, control, shared);
    if (warp == 2 && threadIdx.x % 32 == 0) fetch_values<C>(arguments, control, shared);
  } else {
    take_registers<C::kUse.many_registers()>();
    compute_tiles<C>(arguments, control, shared, warp / 4 - 1);
  }
#endif
}

}  // namespace inlay::attention::cuda
