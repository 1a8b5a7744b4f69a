// Products of 64 rows by 128 columns of one expert, and how their operands come to shared memory.
//
// The summed dimension comes 128 bytes at a time. An operand's values lie in memory either along it ("deep"), or its
// rows do, and values of one row lie side by side. Both come to shared memory as they lie in memory: rows of 128 bytes,
// whose 16-byte pieces are permuted by the row, so that neither eight rows of a piece nor a tf32 product's four rows of
// two pieces share a bank. Columns are two groups of 64, gates and what they gate for instance.
#pragma once

#include "common/cuda/pipeline.cuh"
#include "common/cuda/split.cuh"
#include "moe/cuda/general.h"

namespace inlay::moe::cuda {

using namespace inlay::cuda;

constexpr int kTileRows = static_cast<int>(kGeneralRows), kGroupColumns = 64, kTileColumns = 2 * kGroupColumns;
constexpr int kTileThreads = 128, kTileWarps = kTileThreads / 32;
constexpr int kRowBytes = 128, kSixteenRows = 16 * kRowBytes;
constexpr int kGroupBytes = kGroupColumns * kRowBytes;  // 64 rows or columns of an operand
constexpr int kStageBytes = 3 * kGroupBytes, kStages = 2;
constexpr int kTileSharedBytes = kStages * kStageBytes;
constexpr int kResultStride = kTileColumns + 8;  // of results in shared memory, where rows then have other banks
static_assert(kTileRows * kResultStride * sizeof(float) <= kTileSharedBytes);

template <typename T>
constexpr int kDepth = kRowBytes / sizeof(T);  // of the summed dimension, at a time; also how many columns a row holds

using TileSums = Accumulator[2][8];  // a warp's: two of its 16 rows, eight of its 8 columns

__device__ __forceinline__ uint32_t piece_offset(int row, int piece) {
  const int turned = row % 8 * 2 % 8 + row % 8 / 4;
  return row * kRowBytes + ((piece ^ turned) * 16);
}

__device__ __forceinline__ bool is_aligned(const void* data, int64_t stride_bytes) {
  return ((reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride_bytes)) & 15) == 0;
}

// 16 bytes of shared memory from the first `values` values, wherever those lie; the others become zero.
template <typename T>
__device__ __forceinline__ void copy_values(uint32_t to, const T* from, int values) {
  Packed<T, 16 / sizeof(T)> piece{};
#pragma unroll
  for (int j = 0; j < static_cast<int>(16 / sizeof(T)); ++j) {
    if (j < values) piece.values[j] = from[j];
  }
  store_shared(to, *reinterpret_cast<const uint4*>(&piece));
}

// A group's 64 rows, of which `depth` values are left, or more: a piece of each by a thread. Its i-th row is sixteen
// further on than the one before; it begins at from(i), and is zero unless exists(i).
template <typename T, typename From, typename Exists>
__device__ __forceinline__ void fetch_deep(uint32_t group, int depth, bool aligned, const From& from,
                                           const Exists& exists) {
  constexpr int kPiece = 16 / sizeof(T);
  const int piece = threadIdx.x % 8, values = max(min(depth - piece * kPiece, kPiece), 0);
  const uint32_t to = group + piece_offset(threadIdx.x / 8, piece);
  if (aligned) {
    const int bytes = values * static_cast<int>(sizeof(T));
#pragma unroll
    for (int i = 0; i < kTileRows / 16; ++i) {
      copy_async_partial(to + i * kSixteenRows, from(i) + piece * kPiece, exists(i) ? bytes : 0);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kTileRows / 16; ++i) {
      copy_values(to + i * kSixteenRows, from(i) + piece * kPiece, exists(i) ? values : 0);
    }
  }
}

// The same for values that lie across the depth: 64 of each of `kDepth` rows, of which `columns` are left, or more.
template <typename T, typename From, typename Exists>
__device__ __forceinline__ void fetch_across(uint32_t group, int columns, bool aligned, const From& from,
                                             const Exists& exists) {
  constexpr int kPiece = 16 / sizeof(T);
  const int piece = threadIdx.x % 8;
#pragma unroll
  for (int panel = 0; panel < kGroupColumns / kDepth<T>; ++panel) {
    const int first = panel * kDepth<T> + piece * kPiece, values = max(min(columns - first, kPiece), 0);
    const uint32_t to = group + panel * kDepth<T> * kRowBytes + piece_offset(threadIdx.x / 8, piece);
    if (aligned) {
      const int bytes = values * static_cast<int>(sizeof(T));
#pragma unroll
      for (int i = 0; i < kDepth<T> / 16; ++i) {
        copy_async_partial(to + i * kSixteenRows, from(i) + first, exists(i) ? bytes : 0);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kDepth<T> / 16; ++i) {
        copy_values(to + i * kSixteenRows, from(i) + first, exists(i) ? values : 0);
      }
    }
  }
}

// The operands of a step, 32 bytes deep, as a warp's lanes read them. The warp's rows are the first or the second 32,
// its columns one group.
template <typename T, bool kRowsDeep, bool kColumnsDeep>
class Operands {
 public:
  __device__ __forceinline__ Operands(uint32_t rows, uint32_t columns) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = warp / 2 * 32;
    columns += warp % 2 * kGroupBytes;
    if constexpr (kRowsDeep) {
      rows_ = rows + piece_offset(warp_row + lane % 16, lane / 16);
    } else if constexpr (sizeof(T) == 2) {
      rows_ = rows + piece_offset(lane / 16 * 8 + lane % 8, warp_row / 8 + lane / 8 % 2);
    } else {
      rows_ = rows + warp / 2 * (kDepth<T> * kRowBytes) + value_offset(0);
      next_rows_ = rows + warp / 2 * (kDepth<T> * kRowBytes) + value_offset(4);
    }
    if constexpr (kColumnsDeep) {
      columns_ = columns + piece_offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    } else if constexpr (sizeof(T) == 2) {
      columns_ = columns + piece_offset(lane % 16, lane / 16);
    } else {
      columns_ = columns + value_offset(0);
      next_columns_ = columns + value_offset(4);
    }
  }

  // Sixteen rows as an `a`.
  __device__ __forceinline__ void load_rows(Fragment& a, int sixteen, int step) const {
    if constexpr (kRowsDeep) {
      load_matrices<false>(a, (rows_ ^ step * 32) + sixteen * kSixteenRows);
    } else if constexpr (sizeof(T) == 2) {
      load_matrices<true>(a, (rows_ ^ sixteen * 32) + step * kSixteenRows);
    } else {
      const uint32_t down = step * 8 * kRowBytes;
      a[0] = load_shared_word((rows_ ^ sixteen * 64) + down);
      a[1] = load_shared_word((rows_ ^ (sixteen * 64 + 32)) + down);
      a[2] = load_shared_word((next_rows_ ^ sixteen * 64) + down);
      a[3] = load_shared_word((next_rows_ ^ (sixteen * 64 + 32)) + down);
    }
  }

  // Sixteen columns as two `b`.
  __device__ __forceinline__ void load_columns(Fragment& b, int sixteen, int step) const {
    if constexpr (kColumnsDeep) {
      load_matrices<false>(b, (columns_ ^ step * 32) + sixteen * kSixteenRows);
    } else if constexpr (sizeof(T) == 2) {
      load_matrices<true>(b, (columns_ ^ sixteen * 32) + step * kSixteenRows);
    } else {
      const uint32_t down = sixteen / 2 * (kDepth<T> * kRowBytes) + step * 8 * kRowBytes;
      const int across = sixteen % 2 * 64;
      b[0] = load_shared_word((columns_ ^ across) + down);
      b[1] = load_shared_word((next_columns_ ^ across) + down);
      b[2] = load_shared_word((columns_ ^ (across + 32)) + down);
      b[3] = load_shared_word((next_columns_ ^ (across + 32)) + down);
    }
  }

 private:
  // Of a lane's float32 value in row `row` plus its own of four, and in its own of eight columns.
  __device__ static uint32_t value_offset(int row) {
    const int lane = threadIdx.x % 32;
    return piece_offset(row + lane % 4, lane / 16) + lane / 4 % 4 * 4;
  }

  uint32_t rows_, columns_, next_rows_ = 0, next_columns_ = 0;
};

// sums += a stage's products.
template <typename T, bool kRowsDeep, bool kColumnsDeep>
__device__ __forceinline__ void add_products(TileSums& sums, uint32_t stage) {
  const Operands<T, kRowsDeep, kColumnsDeep> operands(stage, stage + kGroupBytes);
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      Fragment rows[2];
#pragma unroll
      for (int m = 0; m < 2; ++m) operands.load_rows(rows[m], m, step);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        Fragment columns;
        operands.load_columns(columns, pair, step);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add<T>(sums[m][2 * pair], rows[m], columns[0], columns[1]);
          multiply_add<T>(sums[m][2 * pair + 1], rows[m], columns[2], columns[3]);
        }
      }
    }
  } else {
#pragma unroll 1
    for (int first = 0; first < 4; first += 2) {
      SplitFragment rows[2][2];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          Fragment words;
          operands.load_rows(words, m, first + step);
          rows[step][m].set(__uint_as_float(words[0]), __uint_as_float(words[1]), __uint_as_float(words[2]),
                            __uint_as_float(words[3]));
        }
      }
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        Fragment columns[2];
        operands.load_columns(columns[0], pair, first);
        operands.load_columns(columns[1], pair, first + 1);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            Accumulator large{}, small{};
#pragma unroll
            for (int step = 0; step < 2; ++step) {
              multiply_add_split(large, small, rows[step][m], __uint_as_float(columns[step][2 * half]),
                                 __uint_as_float(columns[step][2 * half + 1]));
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[m][2 * pair + half][j] += large[j] + small[j];
          }
        }
      }
    }
  }
}

// The sums of `steps` stages. fetch(stage, step) starts what a step needs, multiply(sums, stage) adds its products.
template <typename Fetch, typename Multiply>
__device__ __forceinline__ void sum_products(TileSums& sums, int steps, const Fetch& fetch, const Multiply& multiply) {
  const uint32_t shared = shared_address(dynamic_shared());
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[m][i][j] = 0.0f;
    }
  }
  if (steps > 0) fetch(shared, 0);
  commit_copies();
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<0>();
    __syncthreads();  // this stage is there, and the other is no longer read
    if (step + 1 < steps) fetch(shared + (step + 1) % kStages * kStageBytes, step + 1);
    commit_copies();
    multiply(sums, shared + step % kStages * kStageBytes);
  }
}

// Puts a block's sums into shared memory, [64, kResultStride].
__device__ __forceinline__ const float* share_sums(const TileSums& sums) {
  float* const results = reinterpret_cast<float*>(dynamic_shared());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  wait_for_copies<0>();
  __syncthreads();
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float* const row = results + (warp / 2 * 32 + m * 16 + r * 8 + lane / 4) * kResultStride +
                         warp % 2 * kGroupColumns + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        *reinterpret_cast<float2*>(row + i * 8) = make_float2(sums[m][i][2 * r], sums[m][i][2 * r + 1]);
      }
    }
  }
  __syncthreads();
  return results;
}

// Where an expert's rows are.
struct ExpertRows {
  int first = 0;  // in the order of rows
  int count = 0;
  int padded = 0;  // of the first one, where rows are padded

  __device__ ExpertRows(const Rows& rows, const PaddedRows& places, int expert) {
    first = expert > 0 ? rows.ends[expert - 1] : 0;
    count = rows.ends[expert] - first;
    if (count > 0) padded = places.places[rows.slots[first]];
  }
};

}  // namespace inlay::moe::cuda
