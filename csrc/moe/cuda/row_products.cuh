// Products of experts' rows and matrices for 16-bit values on Hopper: a tile of 128 rows of one expert, by 256 columns.
//
//   kFirst        h = x_rows gate_up_proj', a = activation(h)             rows gathered by their tokens
//   kResults      results = a down_proj', or dx = dh gate_up_proj         padded rows
//   kActivations  dA' = dy_rows down_proj, and from it and h: dh, a       rows gathered
//
// A block stays on its multiprocessor and works on tiles in turn. Two warps fetch: matrices by the copy engine, and so
// padded rows; gathered ones thread by thread, 16 bytes each. Two warpgroups multiply 64 rows each; the second has a
// rest where an expert's last tile has no more than 64. Two warps do what is left to do with rounded results while the
// next tile is multiplied: between tiles it took a seventh of the time where 768 is summed over.
#pragma once

#include "moe/cuda/row_results.cuh"

namespace inlay::moe::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Where box `box` of a tile's columns is in the matrix. Of gates and what they gate, where they are apart, boxes take
// turns, so that a thread has both of one activation.
template <class C>
__device__ __forceinline__ BoxPlace matrix_box(const RowProductArguments& p, int column_tile, int box, int depth) {
  const bool halves = C::kStep == RowStep::kFirst && p.halves;
  const int column = halves ? column_tile * (kTileColumns / 2) + box / 2 * 64 : column_tile * kTileColumns + box * 64;
  const int head = halves ? box % 2 : 0;
  return C::kTransposed ? BoxPlace{column, depth, head} : BoxPlace{depth, column, head};
}

template <class C>
__device__ __forceinline__ void fetch_gathered(const RowProductArguments& p, Ring<typename C::Memory>& ring,
                                               uint32_t shared) {
  using T = typename C::T;
  using Memory = typename C::Memory;
  constexpr int kRowStep = kFetchThreads / 8, kCopies = kTileRows / kRowStep;
  const unsigned thread = threadIdx.x;
  const int piece_column = thread % 8 * 8, first_row = thread / 8;
  const uint32_t to = shared + Tile<T, kTileRows, Memory::kDepth>::offset(first_row, piece_column);
  Turn<Memory::kStages> turn;
  TileOrder order(p.table, p.column_tiles);
  BlockTiles<C::kDeals, Memory> own(ring);
  TileDealer<Memory> dealer(ring, p.table, order.tiles);
  // The next tile's tokens are read while this one's rows are fetched.
  int tokens[kCopies];
  RowTile next{};
  const auto look_ahead = [&] {
    if (C::kDeals && thread == 0) dealer.deal();
    __syncwarp();
    const int index = own.next();
    if (index >= order.tiles) return false;
    next = order.find(index);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = first_row + i * kRowStep;
      tokens[i] = row < next.rows ? p.tokens[next.first_padded + next.row + row] : -1;
    }
    return true;
  };
  bool more = look_ahead();
#pragma unroll 1
  while (more) {
    const RowTile tile = next;
    const T* from[kCopies];
    unsigned wanted = 0;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      wanted |= (tokens[i] >= 0 ? 1u : 0u) << i;
      from[i] = row_of<T>(p.gathered, p.gathered_stride, tokens[i]) + piece_column;
    }
    more = look_ahead();
    const bool both_halves = tile.rows > kTileRows / 2;
#pragma unroll 1
    for (int depth = 0; depth < p.depth; depth += Memory::kDepth) {
      Barrier& full = ring.full[turn.stage];
      wait_at(ring.free[turn.stage], turn.phase + 1);
      if (thread == 0) {
        expect_bytes(full, kBoxes * Memory::kBoxBytes, 0);
        fetch_columns<Memory>(shared + turn.stage * Memory::kStageBytes + Memory::kRowBytes, p.matrix, tile.expert,
                              full, [&](int box) { return matrix_box<C>(p, tile.column_tile, box, depth); });
      }
      const bool within = depth + piece_column < p.depth;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (i < kCopies / 2 || both_halves) {
          copy_async_or_zero(to + turn.stage * Memory::kStageBytes + i * kRowStep * 128, from[i] + (within ? depth : 0),
                             within && (wanted >> i & 1));
        }
      }
      arrive_after_copies(full);
      turn.next();
    }
  }
}

template <class C>
__device__ __forceinline__ void fetch_padded(const RowProductArguments& p, Ring<typename C::Memory>& ring,
                                             uint32_t shared) {
  using Memory = typename C::Memory;
  Turn<Memory::kStages> turn;
  TileOrder order(p.table, p.column_tiles);
  BlockTiles<C::kDeals, Memory> own(ring);
#pragma unroll 1
  for (int index = own.next(); index < order.tiles; index = own.next()) {
    const RowTile tile = order.find(index);
    if (threadIdx.x == 0) {
#pragma unroll 1
      for (int depth = 0; depth < p.depth; depth += Memory::kDepth) {
        Barrier& full = ring.full[turn.stage];
        const uint32_t to = shared + turn.stage * Memory::kStageBytes;
        wait_at(ring.free[turn.stage], turn.phase + 1);
        expect_bytes(full, Memory::kStageBytes, 0);
        fetch_box(to, p.rows, depth, tile.first_padded + tile.row, 0, 0, full);
        fetch_columns<Memory>(to + Memory::kRowBytes, p.matrix, tile.expert, full,
                              [&](int box) { return matrix_box<C>(p, tile.column_tile, box, depth); });
        turn.next();
      }
    }
    __syncwarp();
  }
}

template <class C>
__device__ __forceinline__ void multiply_rows(const RowProductArguments& p, Ring<typename C::Memory>& ring,
                                              uint32_t shared, int group) {
  using T = typename C::T;
  using Memory = typename C::Memory;
  const int stages = (p.depth + Memory::kDepth - 1) / Memory::kDepth;
  Turn<Memory::kStages> turn;
  int count = 0;
  TileOrder order(p.table, p.column_tiles);
  BlockTiles<C::kDeals, Memory> own(ring);
#pragma unroll 1
  for (int index = own.next(); index < order.tiles; index = own.next()) {
    const RowTile tile = order.find(index);
    if (tile.rows <= group * 64) {
      pass_stages(ring, turn, stages);
      continue;
    }
    Accumulator c[kTileColumns / 8];
    multiply_stages<T, false, C::kTransposed, C::kGathers>(c, ring, turn, shared, stages, group);
    if (p.bias.data) add_bias<T>(p, tile, C::kStep == RowStep::kFirst && p.halves, c);
    hand_over<T, false>(c, ring, shared, group, count++);
  }
}

// What becomes of the results: plain ones go as they are, by one thread.
template <class C>
__device__ __forceinline__ void store_tiles(const RowProductArguments& p, Ring<typename C::Memory>& ring,
                                            uint32_t shared) {
  using T = typename C::T;
  using Memory = typename C::Memory;
  const bool plain = is_plain(p);
  const int first_block = threadIdx.x / 32 % kStoreWarps;
  int counts[kGroups] = {};
  TileOrder order(p.table, p.column_tiles);
  if constexpr (C::kStep == RowStep::kResults) {
    for (Barrier& free : ring.results_free) {
      if (threadIdx.x == kFetchThreads) arrive(free);
    }
  } else {
    for (Barrier& free : ring.results_free) arrive_as_warp(free);
  }
  BlockTiles<C::kDeals, Memory> own(ring);
  RowTile next{};
  float next_weight = 0.0f;
  int index = own.next();
  if (index < order.tiles) {
    next = order.find(index);
    if (C::kStep == RowStep::kActivations) next_weight = look_ahead<T>(p, next, first_block * 16);
  }
#pragma unroll 1
  while (index < order.tiles) {
    const RowTile tile = next;
    index = own.next();
    const bool more = index < order.tiles;
    if (more) next = order.find(index);
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
      if (tile.rows <= group * 64) continue;
      const uint32_t results = results_of<Memory>(shared, group);
      const auto wait = [&] { wait_at(ring.results_full[group], group == 0 ? counts[0]++ : counts[1]++); };
      if constexpr (C::kStep == RowStep::kResults) {
        if (threadIdx.x == kFetchThreads) {
          wait();
          for (int box = 0; box < kBoxes; ++box) {
            store_box(p.results, tile.column_tile * kTileColumns + box * 64, tile.first_padded + tile.row + group * 64,
                      0, 0, results + box * kSquareBytes);
          }
          wait_for_stores();
          arrive(ring.results_free[group]);
        }
        __syncwarp();
      } else {
        for (int block = first_block; block < 4; block += kStoreWarps) {
          const BlockRows rows(tile, group, block);
          const auto wait_once = [&] {
            if (block < kStoreWarps) wait();
          };
          if constexpr (C::kStep == RowStep::kFirst) {
            wait_once();
            if (plain) {
              store_activations<T, true>(p, rows, tile, results);
            } else {
              store_activations<T, false>(p, rows, tile, results);
            }
          } else {
            const float weight = next_weight;
            if (block + kStoreWarps < 4) {
              next_weight = look_ahead<T>(p, tile, group * 64 + (block + kStoreWarps) * 16);
            } else if (group == 0 && tile.rows > 64) {
              next_weight = look_ahead<T>(p, tile, 64 + first_block * 16);
            } else if (more) {
              next_weight = look_ahead<T>(p, next, first_block * 16);
            }
            if (plain) {
              store_activation_gradients<T, true>(p, rows, tile, results, weight, wait_once);
            } else {
              store_activation_gradients<T, false>(p, rows, tile, results, weight, wait_once);
            }
          }
        }
        arrive_as_warp(ring.results_free[group]);
      }
    }
  }
  if (C::kStep == RowStep::kResults && threadIdx.x == kFetchThreads) wait_until_stored();
}

#endif

template <class C>
__global__ __launch_bounds__(kTileThreads, 1) void row_product_kernel(const __grid_constant__ RowProductArguments p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Memory = typename C::Memory;
  char* const memory = dynamic_shared();
  const uint32_t shared = shared_address(memory);
  auto& ring = *reinterpret_cast<Ring<Memory>*>(memory + Memory::kControlAt);
  if (threadIdx.x == 0)
    init_ring(ring, C::kGathers ? kFetchThreads : 0, C::kStep == RowStep::kResults ? 1 : kStoreWarps);
  wait_for_predecessor();
  __syncthreads();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp < kFetchThreads / 32) {
    if constexpr (C::kGathers) {
      fetch_gathered<C>(p, ring, shared);
    } else if (warp == 0) {
      fetch_padded<C>(p, ring, shared);
    }
  } else if (warp < 4) {
    store_tiles<C>(p, ring, shared);
  } else {
    multiply_rows<C>(p, ring, shared, warp / 4 - 1);
  }
#endif
}

}  // namespace inlay::moe::cuda
