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

  __device__ MatrixTile(const MatrixGradientArguments& p, const TileOrder& order, int tile) {
    const int of_expert = p.hidden_tiles * p.column_tiles;
    expert = tile / of_expert;
    const int own = tile - expert * of_expert, column_tile = own / p.hidden_tiles;
    hidden = (own - column_tile * p.hidden_tiles) * kTileRows;
    column = column_tile * kTileColumns;
    first_padded = order.units[expert] * kPaddedUnit;
    rows = (order.units[expert + 1] - order.units[expert]) * kPaddedUnit;
  }
};

template <class C>
__device__ __forceinline__ void fetch_rows(const MatrixGradientArguments& p, TileControl& control, uint32_t shared) {
  using T = typename C::T;
  constexpr int kRowStep = kFetchThreads / 16, kCopies = kTileDepth / kRowStep;
  static_assert(kRowStep == 4);  // every other copy is to the other half of what rows are permuted by
  using Rows = Tile<T, kTileDepth, kTileRows>;
  const unsigned thread = threadIdx.x;
  const int piece_column = thread % 16 * 8, first_row = thread / 16;
  const uint32_t to = shared + Rows::offset(first_row, piece_column);
  Turn<kStages> turn;
#pragma unroll 1
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const MatrixTile tile(p, control.order, index);
    const bool within = tile.hidden + piece_column < p.hidden;
    const T* const from = static_cast<const T*>(p.gathered) + (within ? tile.hidden + piece_column : 0);
    const int32_t* const tokens = p.tokens + tile.first_padded + first_row;
    int next[kCopies];
    const auto look_ahead = [&](int row) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) next[i] = row < tile.rows ? tokens[row + i * kRowStep] : -1;
    };
    look_ahead(0);
#pragma unroll 1
    for (int row = 0; row < tile.rows; row += kTileDepth) {
      int token[kCopies];
#pragma unroll
      for (int i = 0; i < kCopies; ++i) token[i] = next[i];
      look_ahead(row + kTileDepth);
      Barrier& full = control.ring.full[turn.stage];
      wait_at(control.ring.free[turn.stage], turn.phase + 1);
      if (thread == 0) {
        expect_bytes(full, kBoxes * kBoxBytes, 0);
        fetch_columns(shared + turn.stage * kStageBytes + kRowBytes, p.columns, 0, full,
                      [&](int box) { return BoxPlace{tile.column + box * 64, tile.first_padded + row, 0}; });
      }
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        copy_async_or_zero((i % 2 ? to ^ 64 : to) + turn.stage * kStageBytes + i * kRowStep * 128,
                           from + max(token[i], 0) * p.gathered_stride, within && token[i] >= 0);
      }
      arrive_after_copies(full);
      turn.next();
    }
  }
}

template <class C>
__device__ __forceinline__ void sum_over_rows(const MatrixGradientArguments& p, TileControl& control, uint32_t shared,
                                              int group) {
  using T = typename C::T;
  const uint32_t results = shared + kResultsAt + group * kResultBytes;
  Turn<kStages> turn;
  int count = 0;
#pragma unroll 1
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const MatrixTile tile(p, control.order, index);
    if (tile.rows == 0) {
      hand_zeros_over(control.ring, results, group, count++);
      continue;
    }
    Accumulator c[kTileColumns / 8];
    multiply_stages<T, true, true, true>(c, control.ring, turn, shared, tile.rows / kTileDepth, group);
    hand_over<T, C::kTurnsOver>(c, control.ring, results, group, count++);
  }
}

template <class C>
__device__ __forceinline__ void store_gradients(const MatrixGradientArguments& p, TileControl& control,
                                                uint32_t shared) {
  int count = 0;
#pragma unroll 1
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x, ++count) {
    const MatrixTile tile(p, control.order, index);
    for (int group = 0; group < kGroups; ++group) {
      wait_at(control.ring.results_full[group], count);
      for (int box = 0; box < kBoxes; ++box) {
        const int hidden = tile.hidden + group * 64, column = tile.column + box * 64;
        const uint32_t from = shared + kResultsAt + group * kResultBytes + box * kBoxBytes;
        store_box(p.gradient, C::kTurnsOver ? hidden : column, C::kTurnsOver ? column : hidden, 0, tile.expert, from);
      }
      wait_for_stores();
      arrive(control.ring.results_free[group]);
    }
  }
  wait_until_stored();
}

#endif

template <class C>
__global__ __launch_bounds__(kTileThreads,
                             1) void matrix_gradient_kernel(const __grid_constant__ MatrixGradientArguments p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  char* const memory = dynamic_shared();
  const uint32_t shared = shared_address(memory);
  auto& control = *reinterpret_cast<TileControl*>(memory + kControlAt);
  if (threadIdx.x == 0) init_ring(control.ring, kFetchThreads, 1);
  wait_for_predecessor();
  find_tiles(control.order, p.ends, p.experts, 1);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp < kFetchThreads / 32) {
    fetch_rows<C>(p, control, shared);
  } else if (warp < 4) {
    if (threadIdx.x == kFetchThreads) store_gradients<C>(p, control, shared);
  } else {
    sum_over_rows<C>(p, control, shared, warp / 4 - 1);
  }
#endif
}

}  // namespace inlay::moe::cuda
