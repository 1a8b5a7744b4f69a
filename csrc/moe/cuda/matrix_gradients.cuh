// Gradients of experts' matrices for 16-bit values on Hopper: of one expert, 128 of the hidden size by 256 of what the
// matrix has on its other side, summed over the expert's rows.
//
//   dgate_up_proj   x gathered by its tokens, and dh          ddown_proj   dy gathered, and a
//
// Tiles pass through a ring as those of row_products.cuh do: 64 rows a stage, and what is hidden is gathered. Padding
// is zero on both sides. Experts without rows get zeros.
#pragma once

#include "moe/cuda/matrix_arguments.h"
#include "moe/cuda/row_results.cuh"

namespace inlay::moe::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// All of the hidden size comes before the next columns.
struct MatrixTile {
  int expert, hidden, column, first_padded, rows;

  __device__ MatrixTile(const MatrixGradientArguments& p, int tile) {
    const int of_expert = p.hidden_tiles * p.column_tiles;
    expert = tile / of_expert;
    const int own = tile - expert * of_expert, column_tile = own / p.hidden_tiles;
    hidden = (own - column_tile * p.hidden_tiles) * kTileRows;
    column = column_tile * kTileColumns;
    first_padded = p.units[expert] * kPaddedUnit;
    rows = (p.units[expert + 1] - p.units[expert]) * kPaddedUnit;
  }
};

// By the fetching warps: what is hidden. Each lane knows one row's token, two stages ahead.
template <class C>
__device__ __forceinline__ void fetch_rows(const MatrixGradientArguments& p, Ring<typename C::Memory>& ring,
                                           uint32_t shared) {
  using T = typename C::T;
  using Memory = typename C::Memory;
  constexpr int kRowStep = kFetchThreads / 16, kCopies = Memory::kDepth / kRowStep;
  // Every other copy is to the other half of what rows are permuted by; a warp has as many rows as lanes.
  static_assert(kRowStep == 4 && kCopies == 16);
  const int thread = threadIdx.x, lane = thread % 32;
  const int piece_column = thread % 16 * 8, first_row = thread / 16;
  const int known_row = lane / 2 * kRowStep + thread / 32 * 2 + lane % 2;
  const uint32_t to = shared + Tile<T, Memory::kDepth, kTileRows>::offset(first_row, piece_column);
  const auto look_up = [&](const MatrixTile& tile, int row) {
    return row < tile.rows ? p.tokens[tile.first_padded + row + known_row] : -1;
  };
  Turn<Memory::kStages> turn;
  MatrixTile tile(p, blockIdx.x);
  int first = look_up(tile, 0), second = look_up(tile, Memory::kDepth);
#pragma unroll 1
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const MatrixTile next(p, min(index + static_cast<int>(gridDim.x), p.tiles - 1));
    const int next_first = look_up(next, 0), next_second = look_up(next, Memory::kDepth);
    const bool within = tile.hidden + piece_column < p.hidden;
    const T* const from = static_cast<const T*>(p.gathered) + (within ? tile.hidden + piece_column : 0);
#pragma unroll 1
    for (int row = 0; row < tile.rows; row += Memory::kDepth) {
      const int third = look_up(tile, row + 2 * Memory::kDepth);
      wait_at(ring.free[turn.stage], turn.phase + 1);
      const uint32_t stage = to + turn.stage * Memory::kStageBytes;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int token = __shfl_sync(0xffffffffu, first, 2 * i + lane / 16);
        copy_async_or_zero((i % 2 ? stage ^ 64 : stage) + i * kRowStep * 128, row_of<T>(from, p.gathered_stride, token),
                           within && token >= 0);
      }
      arrive_after_copies(ring.full[turn.stage]);
      turn.next();
      first = second;
      second = third;
    }
    tile = next;
    first = next_first;
    second = next_second;
  }
}

// By one thread: the other side.
template <class C>
__device__ __forceinline__ void fetch_padded_columns(const MatrixGradientArguments& p, Ring<typename C::Memory>& ring,
                                                     uint32_t shared) {
  using Memory = typename C::Memory;
  Turn<Memory::kStages> turn;
#pragma unroll 1
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const MatrixTile tile(p, index);
#pragma unroll 1
    for (int row = 0; row < tile.rows; row += Memory::kDepth) {
      Barrier& full = ring.full[turn.stage];
      wait_at(ring.free[turn.stage], turn.phase + 1);
      expect_bytes(full, kBoxes * Memory::kBoxBytes, 0);
      fetch_columns<Memory>(shared + turn.stage * Memory::kStageBytes + Memory::kRowBytes, p.columns, 0, full,
                            [&](int box) { return BoxPlace{tile.column + box * 64, tile.first_padded + row, 0}; });
      turn.next();
    }
  }
}

template <class C>
__device__ __forceinline__ void sum_over_rows(const MatrixGradientArguments& p, Ring<typename C::Memory>& ring,
                                              uint32_t shared, int group) {
  using T = typename C::T;
  using Memory = typename C::Memory;
  Turn<Memory::kStages> turn;
  int count = 0;
#pragma unroll 1
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const MatrixTile tile(p, index);
    if (tile.rows == 0) {
      hand_zeros_over(ring, shared, group, count++);
      continue;
    }
    Accumulator c[kTileColumns / 8];
    multiply_stages<T, true, true, true>(c, ring, turn, shared, tile.rows / Memory::kDepth, group);
    hand_over<T, C::kTurnsOver>(c, ring, shared, group, count++);
  }
}

template <class C>
__device__ __forceinline__ void store_gradients(const MatrixGradientArguments& p, Ring<typename C::Memory>& ring,
                                                uint32_t shared) {
  using Memory = typename C::Memory;
  int count = 0;
  for (Barrier& free : ring.results_free) arrive(free);
#pragma unroll 1
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x, ++count) {
    const MatrixTile tile(p, index);
    for (int group = 0; group < kGroups; ++group) {
      wait_at(ring.results_full[group], count);
      for (int box = 0; box < kBoxes; ++box) {
        const int hidden = tile.hidden + group * 64, column = tile.column + box * 64;
        const uint32_t from = results_of<Memory>(shared, group) + box * kSquareBytes;
        store_box(p.gradient, C::kTurnsOver ? hidden : column, C::kTurnsOver ? column : hidden, 0, tile.expert, from);
      }
      wait_for_stores();
      arrive(ring.results_free[group]);
    }
  }
  wait_until_stored();
}

#endif

template <class C>
__global__ __launch_bounds__(kTileThreads,
                             1) void matrix_gradient_kernel(const __grid_constant__ MatrixGradientArguments p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Memory = typename C::Memory;
  char* const memory = dynamic_shared();
  const uint32_t shared = shared_address(memory);
  auto& ring = *reinterpret_cast<Ring<Memory>*>(memory + Memory::kControlAt);
  if (threadIdx.x == 0) init_ring(ring, kFetchThreads, 1);
  wait_for_predecessor();
  __syncthreads();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp < kFetchThreads / 32) {
    fetch_rows<C>(p, ring, shared);
  } else if (warp < 4) {
    if (threadIdx.x == kFetchThreads) store_gradients<C>(p, ring, shared);
    if (threadIdx.x == kFetchThreads + 32) fetch_padded_columns<C>(p, ring, shared);
  } else {
    sum_over_rows<C>(p, ring, shared, warp / 4 - 1);
  }
#endif
}

}  // namespace inlay::moe::cuda
