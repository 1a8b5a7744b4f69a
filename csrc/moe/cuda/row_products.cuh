// Products of experts' rows and matrices for 16-bit values on Hopper: a tile of 128 rows of one expert, by 256 columns.
//
//   kFirst        h = x_rows gate_up_proj', a = activation(h)             rows gathered by their tokens
//   kResults      results = a down_proj', or dx = dh gate_up_proj         padded rows
//   kActivations  dA' = dy_rows down_proj, and from it and h: dh, a       rows gathered
//
// A block stays on its multiprocessor and takes tiles in turn. Two warps fetch: matrices by the copy engine, and so
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
__device__ __forceinline__ void fetch_gathered(const RowProductArguments& p, TileControl& control, uint32_t shared) {
  using T = typename C::T;
  constexpr int kRowStep = kFetchThreads / 8, kCopies = kTileRows / kRowStep;
  const unsigned thread = threadIdx.x;
  const int piece_column = thread % 8 * 8, first_row = thread / 8;
  const uint32_t to = shared + Tile<T, kTileRows, kTileDepth>::offset(first_row, piece_column);
  Turn<kStages> turn;
  int expert = 0;
  const int tiles = control.order.tiles[p.experts];
#pragma unroll 1
  for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
    expert = control.order.expert_of(index, expert, p.experts);
    const RowTile tile = control.order.find_tile(index, expert);
    const T* from[kCopies];
    unsigned wanted = 0;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = first_row + i * kRowStep;
      const int token = row < tile.rows ? p.tokens[tile.first_padded + tile.row + row] : -1;
      wanted |= (token >= 0 ? 1u : 0u) << i;
      from[i] = static_cast<const T*>(p.gathered) + max(token, 0) * p.gathered_stride + piece_column;
    }
    const bool both_halves = tile.rows > kTileRows / 2;
#pragma unroll 1
    for (int depth = 0; depth < p.depth; depth += kTileDepth) {
      Barrier& full = control.ring.full[turn.stage];
      wait_at(control.ring.free[turn.stage], turn.phase + 1);
      if (thread == 0) {
        expect_bytes(full, kBoxes * kBoxBytes, 0);
        fetch_columns(shared + turn.stage * kStageBytes + kRowBytes, p.matrix, tile.expert, full,
                      [&](int box) { return matrix_box<C>(p, tile.column_tile, box, depth); });
      }
      const bool within = depth + piece_column < p.depth;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (i < kCopies / 2 || both_halves) {
          copy_async_or_zero(to + turn.stage * kStageBytes + i * kRowStep * 128, from[i] + (within ? depth : 0),
                             within && (wanted >> i & 1));
        }
      }
      arrive_after_copies(full);
      turn.next();
    }
  }
}

template <class C>
__device__ __forceinline__ void fetch_padded(const RowProductArguments& p, TileControl& control, uint32_t shared) {
  Turn<kStages> turn;
  int expert = 0;
  const int tiles = control.order.tiles[p.experts];
#pragma unroll 1
  for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
    expert = control.order.expert_of(index, expert, p.experts);
    const RowTile tile = control.order.find_tile(index, expert);
    if (threadIdx.x == 0) {
#pragma unroll 1
      for (int depth = 0; depth < p.depth; depth += kTileDepth) {
        Barrier& full = control.ring.full[turn.stage];
        const uint32_t to = shared + turn.stage * kStageBytes;
        wait_at(control.ring.free[turn.stage], turn.phase + 1);
        expect_bytes(full, kStageBytes, 0);
        fetch_box(to, p.rows, depth, tile.first_padded + tile.row, 0, 0, full);
        fetch_columns(to + kRowBytes, p.matrix, tile.expert, full,
                      [&](int box) { return matrix_box<C>(p, tile.column_tile, box, depth); });
        turn.next();
      }
    }
    __syncwarp();
  }
}

template <class C>
__device__ __forceinline__ void multiply_rows(const RowProductArguments& p, TileControl& control, uint32_t shared,
                                              int group) {
  using T = typename C::T;
  const int stages = (p.depth + kTileDepth - 1) / kTileDepth;
  const uint32_t results = shared + kResultsAt + group * kResultBytes;
  Turn<kStages> turn;
  int expert = 0, count = 0;
  const int tiles = control.order.tiles[p.experts];
#pragma unroll 1
  for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
    expert = control.order.expert_of(index, expert, p.experts);
    const RowTile tile = control.order.find_tile(index, expert);
    if (tile.rows <= group * 64) {
      pass_stages(control.ring, turn, stages);
      continue;
    }
    Accumulator c[kTileColumns / 8];
    multiply_stages<T, false, C::kTransposed, C::kGathers>(c, control.ring, turn, shared, stages, group);
    if (p.bias.data) add_bias<T>(p, tile, C::kStep == RowStep::kFirst && p.halves, c);
    hand_over<T, false>(c, control.ring, results, group, count++);
  }
}

// What becomes of the results: plain ones go as they are, by one thread.
template <class C>
__device__ __forceinline__ void store_tiles(const RowProductArguments& p, TileControl& control, uint32_t shared) {
  using T = typename C::T;
  const bool plain = is_plain(p);
  int expert = 0, count[kGroups] = {};
  const int tiles = control.order.tiles[p.experts];
#pragma unroll 1
  for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
    expert = control.order.expert_of(index, expert, p.experts);
    const RowTile tile = control.order.find_tile(index, expert);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (tile.rows <= group * 64) continue;
      const uint32_t results = shared + kResultsAt + group * kResultBytes;
      const auto wait = [&] { wait_at(control.ring.results_full[group], count[group]++); };
      if constexpr (C::kStep == RowStep::kResults) {
        if (threadIdx.x == kFetchThreads) {
          wait();
          for (int box = 0; box < kBoxes; ++box) {
            store_box(p.results, tile.column_tile * kTileColumns + box * 64, tile.first_padded + tile.row + group * 64,
                      0, 0, results + box * kBoxBytes);
          }
          wait_for_stores();
          arrive(control.ring.results_free[group]);
        }
        __syncwarp();
      } else {
        for (int block = threadIdx.x / 32 % kStoreWarps; block < 4; block += kStoreWarps) {
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
          } else if (plain) {
            store_activation_gradients<T, true>(p, rows, tile, results, wait_once);
          } else {
            store_activation_gradients<T, false>(p, rows, tile, results, wait_once);
          }
        }
        arrive_as_warp(control.ring.results_free[group]);
      }
    }
  }
  if (C::kStep == RowStep::kResults && threadIdx.x == kFetchThreads) wait_until_stored();
}

#endif

template <class C>
__global__ __launch_bounds__(kTileThreads, 1) void row_product_kernel(const __grid_constant__ RowProductArguments p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  char* const memory = dynamic_shared();
  const uint32_t shared = shared_address(memory);
  auto& control = *reinterpret_cast<TileControl*>(memory + kControlAt);
  if (threadIdx.x == 0)
    init_ring(control.ring, C::kGathers ? kFetchThreads : 0, C::kStep == RowStep::kResults ? 1 : kStoreWarps);
  wait_for_predecessor();
  find_tiles(control.order, p.ends, p.experts, p.column_tiles);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp < kFetchThreads / 32) {
    if constexpr (C::kGathers) {
      fetch_gathered<C>(p, control, shared);
    } else if (warp == 0) {
      fetch_padded<C>(p, control, shared);
    }
  } else if (warp < 4) {
    store_tiles<C>(p, control, shared);
  } else {
    multiply_rows<C>(p, control, shared, warp / 4 - 1);
  }
#endif
}

}  // namespace inlay::moe::cuda
