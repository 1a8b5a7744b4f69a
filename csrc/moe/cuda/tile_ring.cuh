// The ring of stages that tiles' operands pass through, and the two sides of it: who fetches, and who multiplies.
//
// A stage has some of the summed dimension: of 128 rows, and of 256 columns of a matrix, as four boxes of 64 columns.
// It is free when all warps have read it. (Blocks of a cluster that fetch half of the columns for each other are
// slower: on an H200 470 TFLOP/s instead of 700 where 1536 is summed over. Each then waits for the slower of both,
// every stage.)
#pragma once

#include "common/cuda/tensor_map.cuh"
#include "common/cuda/wgmma.cuh"
#include "moe/cuda/tile_order.cuh"

namespace inlay::moe::cuda {

using namespace inlay::cuda;

template <class M>
struct Ring {
  Barrier full[M::kStages];
  Barrier free[M::kStages];
  // A group's rounded sums are in their place; and the place is free for a group's next ones, which its first ones must
  // be told as well.
  Barrier results_full[kGroups];
  Barrier results_free[kGroups];
  // Which tiles the block has taken, for all its warps.
  Barrier tile_full[kTilesAhead];
  Barrier tile_free[kTilesAhead];
  int tiles[kTilesAhead];
};
template <class M>
constexpr int kTileSharedBytes = M::kControlAt + static_cast<int>(sizeof(Ring<M>));

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// By one thread. `copying`: how many threads fetch with copies of their own, beside the one that starts bulk copies.
// `storing`: how many arrivals say that results have been read.
template <class M>
__device__ __forceinline__ void init_ring(Ring<M>& ring, int copying, int storing) {
  for (int i = 0; i < M::kStages; ++i) {
    init_barrier(ring.full[i], 1 + copying);
    init_barrier(ring.free[i], kGroups * 4);
  }
  for (int i = 0; i < kGroups; ++i) {
    init_barrier(ring.results_full[i], 4);
    init_barrier(ring.results_free[i], storing);
  }
  for (int i = 0; i < kTilesAhead; ++i) {
    init_barrier(ring.tile_full[i], 1);
    init_barrier(ring.tile_free[i], kTileThreads / 32);
  }
  publish_barriers();
}

// Takes tiles for a block, by one thread: a block that is done sooner, as some tiles have only half of the rows, takes
// more (on an H200 4 % less time than equal shares for Qwen3-30B's experts at 16k tokens). The next is asked for a tile
// ahead.
template <class M>
class TileDealer {
 public:
  __device__ TileDealer(Ring<M>& ring, const TileTable& table, int tiles)
      : ring_(ring), taken_(table.taken), tiles_(tiles), next_(blockIdx.x) {}

  // To all warps of the block; beyond the last tile, once.
  __device__ void deal() {
    if (done_) return;
    wait_at(ring_.tile_free[turn_.stage], turn_.phase + 1);
    ring_.tiles[turn_.stage] = next_;
    arrive(ring_.tile_full[turn_.stage]);
    turn_.next();
    done_ = next_ >= tiles_;
    if (!done_) next_ = gridDim.x + atomicAdd(taken_, 1);
  }

 private:
  Ring<M>& ring_;
  int* taken_;
  int tiles_, next_;
  bool done_ = false;
  Turn<kTilesAhead> turn_;
};

// The tiles of a block, one after another, for one of its warps; a number beyond the last one ends them. They are
// dealt, or every gridDim.x-th is the block's.
template <bool kDealt, class M>
class BlockTiles {
 public:
  __device__ explicit BlockTiles(Ring<M>& ring) : ring_(ring), next_(blockIdx.x) {}

  __device__ int next() {
    if constexpr (kDealt) {
      wait_at(ring_.tile_full[turn_.stage], turn_.phase);
      const int tile = ring_.tiles[turn_.stage];
      arrive_as_warp(ring_.tile_free[turn_.stage]);
      turn_.next();
      return tile;
    } else {
      const int tile = next_;
      next_ += gridDim.x;
      return tile;
    }
  }

 private:
  Ring<M>& ring_;
  Turn<kTilesAhead> turn_;
  int next_;
};

// A stage's columns, at coordinates that `at(box)` gives.
struct BoxPlace {
  int column, row, head;
};
template <class M, class At>
__device__ __forceinline__ void fetch_columns(uint32_t to, const CUtensorMap& map, int expert, Barrier& full, At at) {
#pragma unroll
  for (int box = 0; box < kBoxes; ++box) {
    const BoxPlace place = at(box);
    fetch_box(to + box * M::kBoxBytes, map, place.column, place.row, place.head, expert, full);
  }
}

// The row of a token; of none, the first, which nobody reads.
template <typename T>
__device__ __forceinline__ const T* row_of(const void* rows, uint32_t stride, int token) {
  const uint64_t offset = static_cast<uint64_t>(static_cast<uint32_t>(max(token, 0))) * stride;
  return reinterpret_cast<const T*>(static_cast<const char*>(rows) + offset);
}

// c = the sums over `count` stages, one or more, of this group's 64 rows times the columns. `kCopied`: threads, rather
// than the copy engine, fetched the rows.
template <typename T, bool kTransposedRows, bool kTransposedColumns, bool kCopied, class M>
__device__ __forceinline__ void multiply_stages(Accumulator (&c)[kTileColumns / 8], Ring<M>& ring,
                                                Turn<M::kStages>& turn, uint32_t shared, int count, int group) {
  constexpr int kSteps = M::kDepth / 16;
  constexpr int kRowsStep = kTransposedRows ? 2048 : 32, kColumnsStep = kTransposedColumns ? 2048 : 32;
  const uint64_t first_rows = matrix_descriptor(shared + group * (M::kRowBytes / 2), M::kBoxBytes);
  const uint64_t first_columns = matrix_descriptor(shared + M::kRowBytes, M::kBoxBytes);
  const auto multiply = [&](bool fresh) {
    wait_at(ring.full[turn.stage], turn.phase);
    if (kCopied) publish_shared();  // to the tensor cores
    const uint64_t rows = advance(first_rows, turn.stage * M::kStageBytes);
    const uint64_t columns = advance(first_columns, turn.stage * M::kStageBytes);
    begin_products();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      start_product_of<T, kTileColumns / 8, kTransposedRows, kTransposedColumns>(
          c, advance(rows, step * kRowsStep), advance(columns, step * kColumnsStep), !fresh || step > 0);
    }
    commit_products();
  };
  multiply(true);
  int last = turn.stage;
  turn.next();
#pragma unroll 1
  for (int i = 1; i < count; ++i) {
    multiply(false);
    wait_for_products<1>();
    arrive_as_warp(ring.free[last]);
    last = turn.stage;
    turn.next();
  }
  wait_for_products<0>();
  keep(c);
  arrive_as_warp(ring.free[last]);
}

// What a group does whose rows are all padding: it only passes the stages on.
template <class M>
__device__ __forceinline__ void pass_stages(Ring<M>& ring, Turn<M::kStages>& turn, int count) {
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    wait_at(ring.full[turn.stage], turn.phase);
    arrive_as_warp(ring.free[turn.stage]);
    turn.next();
  }
}

template <class M>
__device__ __forceinline__ uint32_t results_of(uint32_t shared, int group) {
  return shared + M::kResultsAt + group * kResultBytes;
}

// Hands a group's rounded sums over: as squares of 64 by 64 or, turned over, these transposed. `count`: how often
// before.
template <typename T, bool kTurnsOver, class M>
__device__ __forceinline__ void hand_over(const Accumulator (&c)[kTileColumns / 8], Ring<M>& ring, uint32_t shared,
                                          int group, int count) {
  const int first_row = threadIdx.x / 32 % 4 * 16;
  const uint32_t results = results_of<M>(shared, group);
  wait_at(ring.results_free[group], count);
#pragma unroll
  for (int i = 0; i < kTileColumns / 16; ++i) {
    const TileView<T, 64, 64> square{results + i / 4 * kSquareBytes};
    const Fragment packed = {pack_pair<T>(c[2 * i][0], c[2 * i][1]), pack_pair<T>(c[2 * i][2], c[2 * i][3]),
                             pack_pair<T>(c[2 * i + 1][0], c[2 * i + 1][1]),
                             pack_pair<T>(c[2 * i + 1][2], c[2 * i + 1][3])};
    if constexpr (kTurnsOver) {
      square.store_columns_first(packed, i % 4 * 16, first_row);
    } else {
      square.store_rows_first(packed, first_row, i % 4 * 16);
    }
  }
  publish_shared();  // to the copy engine
  arrive_as_warp(ring.results_full[group]);
}

template <class M>
__device__ __forceinline__ void hand_zeros_over(Ring<M>& ring, uint32_t shared, int group, int count) {
  const uint32_t results = results_of<M>(shared, group);
  wait_at(ring.results_free[group], count);
  for (int i = threadIdx.x % 128 * 16; i < kResultBytes; i += 128 * 16) {
    store_shared(results + i, make_uint4(0, 0, 0, 0));
  }
  publish_shared();
  arrive_as_warp(ring.results_full[group]);
}

#endif

}  // namespace inlay::moe::cuda
