// Scores to probabilities and results, as one warpgroup holds them: a thread has two queries, `own_row` of the tile and
// the eighth after it, and of each 8 columns two (see mma.cuh); four neighbouring threads share their queries.
#pragma once

#include "attention/cuda/config.h"
#include "attention/cuda/rows.cuh"
#include "attention/cuda/tiles.cuh"
#include "attention/params.h"
#include "common/cuda/sigmoid.cuh"
#include "common/cuda/tile.cuh"

namespace inlay::attention::cuda {

using namespace inlay::cuda;

constexpr float kLn2 = 0.6931471805599453f;

// From products of q and k to exponents of 2: times `factor`, which is positive; before that, where `before` says so,
// what apply() does.
struct ScoreScale {
  float factor, inner;
  bool before, capped;

  __device__ explicit ScoreScale(const Inputs& in) {
    const float scale = static_cast<float>(in.scale), cap = static_cast<float>(in.softcap);
    capped = cap > 0.0f;
    before = capped || !(scale > 0.0f);
    inner = capped ? scale / cap : scale;
    factor = kLog2E * (capped ? cap : before ? 1.0f : scale);
  }

  template <int kTiles>
  __device__ __forceinline__ void apply(Accumulator (&s)[kTiles]) const {
#pragma unroll
    for (Accumulator& tile : s) {
#pragma unroll
      for (float& x : tile) {
        x *= inner;
        if (capped) asm("tanh.approx.f32 %0, %0;" : "+f"(x));
      }
    }
  }
};

// The keys that this thread's queries see. Of the two ranges' four ends each of the four threads that share them holds
// one, as registers are short.
struct RowLimits {
  int own;

  __device__ __forceinline__ void find(const Inputs& in, const TileInfo& info, int own_row) {
    const int row = min(own_row + (threadIdx.x & 2) * 4, info.query_count - 1);
    const KeyRange seen =
        in.visible(info.first_query + row, info.key_count, info.diagonal, info.batch, info.query_row + row);
    own = static_cast<int>(threadIdx.x & 1 ? seen.end : seen.begin);
  }

  // The first so many of this thread's 32 columns, 2 of each 8, as bits.
  __device__ __forceinline__ static uint32_t columns_below(int limit) {
    const int count = limit <= 0 ? 0 : limit / 8 * 2 + min(limit % 8, 2);
    return count >= 32 ? 0xffffffffu : (1u << count) - 1;
  }

  template <int kTiles>
  __device__ __forceinline__ void hide(Accumulator (&s)[kTiles], int first_key) const {
#pragma unroll
    for (int part = 0; part < kTiles; part += 16) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int from = first_key + part * 8 + threadIdx.x % 4 * 2;
        const int begin = __shfl_sync(0xffffffffu, own, 2 * r, 4), end = __shfl_sync(0xffffffffu, own, 2 * r + 1, 4);
        const uint32_t seen = columns_below(end - from) & ~columns_below(begin - from);
#pragma unroll
        for (int i = 0; i < 16 && part + i < kTiles; ++i) {
          if (!(seen & (1u << (2 * i)))) s[part + i][2 * r] = -INFINITY;
          if (!(seen & (2u << (2 * i)))) s[part + i][2 * r + 1] = -INFINITY;
        }
      }
    }
  }
};

// What is known of the softmax of this thread's queries so far: sums of 2^(factor * (s - top)), of this thread's
// columns.
//
// `top` need not be the largest score, only near enough for 32 bits. It is set when a query has its first scores, and
// then stays for as long as sums do not outgrow kBound: finding maxima takes as long as two thirds of the powers.
template <typename T>
struct RowState {
  // As long as scores exceed `top` by no more than this power of two, settle() leaves it: rescaling o takes time.
  static constexpr float kHeadroom = 8.0f;
  // Of a tile's sum. Probabilities are multiplied as T, of which float16 ends at 2^16.
  static constexpr float kBound = kDType<T> == DType::bf16 ? 0x1p60f : 0x1p15f;

  float top[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};
  float rescaling[2];
  bool settled = false;  // all of the warp's queries have a `top`

  __device__ __forceinline__ void restart() {
    top[0] = top[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
    settled = false;
  }

  // Makes `top` fit the scores. Whether o must be rescaled, the same for the whole warp.
  template <int kTiles>
  __device__ __forceinline__ bool settle(const Accumulator (&s)[kTiles], float factor) {
    float best[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float even = fmaxf(top[r], s[0][2 * r]), odd = s[0][2 * r + 1];
#pragma unroll
      for (int i = 1; i < kTiles; ++i) {
        even = fmaxf(even, s[i][2 * r]);
        odd = fmaxf(odd, s[i][2 * r + 1]);
      }
      best[r] = fmaxf(even, odd);
      best[r] = fmaxf(best[r], __shfl_xor_sync(0xffffffffu, best[r], 1));
      best[r] = fmaxf(best[r], __shfl_xor_sync(0xffffffffu, best[r], 2));
    }
    const bool moved =
        __any_sync(0xffffffffu, (best[0] - top[0]) * factor > kHeadroom || (best[1] - top[1]) * factor > kHeadroom);
    if (moved) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        rescaling[r] = best[r] == -INFINITY ? 1.0f : exp2_fast((top[r] - best[r]) * factor);
        sum[r] *= rescaling[r];
        top[r] = best[r];
      }
      settled = __all_sync(0xffffffffu, top[0] != -INFINITY && top[1] != -INFINITY);
    }
    return moved;
  }

  // s becomes 2^(factor * (s - top)), `added` its sums.
  template <int kTiles>
  __device__ __forceinline__ void exponentiate(Accumulator (&s)[kTiles], float factor, float (&added)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float offset = top[r] == -INFINITY ? 0.0f : -top[r] * factor;
      float even = 0.0f, odd = 0.0f;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        even += s[i][2 * r] = exp2_fast(fmaf(s[i][2 * r], factor, offset));
        odd += s[i][2 * r + 1] = exp2_fast(fmaf(s[i][2 * r + 1], factor, offset));
      }
      added[r] = even + odd;
    }
  }

  // Whether settle() is needed after all. As a branch it also keeps the compiler from moving exponentials to behind the
  // wait that follows.
  __device__ __forceinline__ static bool out_of_bounds(const float (&added)[2]) {
    return __any_sync(0xffffffffu, added[0] > kBound || added[1] > kBound);
  }
  __device__ __forceinline__ void add(const float (&added)[2]) {
    sum[0] += added[0];
    sum[1] += added[1];
  }

  template <int kTiles>
  __device__ __forceinline__ void rescale(Accumulator (&o)[kTiles]) const {
#pragma unroll
    for (Accumulator& tile : o) {
      tile[0] *= rescaling[0];
      tile[1] *= rescaling[0];
      tile[2] *= rescaling[1];
      tile[3] *= rescaling[1];
    }
  }
};

// The scores of this warp's 16 queries once more, by itself.
template <typename T, int kTiles, int kQueries, int kDepth>
__device__ __forceinline__ void recompute_scores(Accumulator (&s)[kTiles], TileView<T, kQueries, kDepth> queries,
                                                 TileView<T, kTiles * 8, kDepth> keys, int first_row) {
#pragma unroll
  for (int i = 0; i < kTiles; i += 2) {
#pragma unroll
    for (int j = 0; j < 4; ++j) s[i][j] = s[i + 1][j] = 0.0f;
#pragma unroll 1
    for (int column = 0; column < kDepth; column += 16) {
      Fragment a, b;
      queries.template load_rows_first<false>(a, first_row, column);
      keys.template load_columns_first<false>(b, i * 8, column);
      multiply_add<T>(s[i], a, b[0], b[1]);
      multiply_add<T>(s[i + 1], a, b[2], b[3]);
    }
  }
}

// Where this thread's rows and pieces of o, y and gate lie.
struct ResultPlace {
  int row[2];
  bool there[2];
  int64_t offset[2];  // of column 0 of y

  __device__ __forceinline__ ResultPlace(const Inputs& in, const TileInfo& info, int own_row) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row[r] = info.query_row + own_row + 8 * r;
      there[r] = own_row + 8 * r < info.query_count;
      const int64_t token = int64_t{info.batch} * in.queries.tokens + row[r];
      offset[r] = (token * in.query_heads + info.head) * in.value_dim;
    }
  }
};

template <typename T, int kTiles>
__device__ __forceinline__ void store_results(void* data, const Inputs& in, const ResultPlace& place,
                                              const Accumulator (&o)[kTiles], const float (&multiplier)[2]) {
  T* const rows[] = {static_cast<T*>(data) + place.offset[0], static_cast<T*>(data) + place.offset[1]};
  store_rows(rows, place.there, static_cast<int>(in.value_dim), o, multiplier);
}

// o times multiplier becomes y before its rounding.
template <typename T, int kTiles>
__device__ __forceinline__ void apply_gate(const Inputs& in, const TileInfo& info, const ResultPlace& place,
                                           Accumulator (&o)[kTiles]) {
  constexpr int kPieces = (kTiles + 3) / 4;
  const int own_column = threadIdx.x % 4 * 8;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const T* const row =
        static_cast<const T*>(in.gate.data) + in.gate.offset(info.batch, place.row[r], info.head) + own_column;
    const int columns = place.there[r] ? static_cast<int>(in.value_dim) - own_column : 0;
    uint32_t words[kPieces][4];
    if ((reinterpret_cast<uintptr_t>(row) & 15) == 0) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) load_piece(words[i], row + i * 32, i * 32 < columns);
    } else {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
          words[i][j / 2] =
              i * 32 < columns ? pack_pair<T>(to_float(row[i * 32 + j]), to_float(row[i * 32 + j + 1])) : 0;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      exchange_words(words[i]);
#pragma unroll
      for (int j = 0; j < 4 && i * 4 + j < kTiles; ++j) {
        float low, high;
        unpack_pair<T>(words[i][j], low, high);
        o[i * 4 + j][2 * r] *= sigmoid<T>(low);
        o[i * 4 + j][2 * r + 1] *= sigmoid<T>(high);
      }
    }
  }
}

// Divides by the sums, with the sink's share, and stores o, y and lse.
template <typename T, int kTiles>
__device__ __forceinline__ void finish_rows(const ForwardParams& params, const TileInfo& info, const RowState<T>& rows,
                                            float factor, Accumulator (&o)[kTiles], int own_row) {
  const Inputs& in = params.inputs;
  const ResultPlace place(in, info, own_row);
  float multiplier[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = rows.sum[r];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    float top = rows.top[r] * factor, share = 1.0f;
    if (in.sinks.data) {
      float sink[1];
      load_as_float(in.sinks.data, in.sinks.dtype, info.head, sink);
      const float larger = fmaxf(top, sink[0] * kLog2E);
      if (larger > -INFINITY) {
        share = exp2_fast(top - larger);
        sum = sum * share + exp2_fast(sink[0] * kLog2E - larger);
        top = larger;
      }
    }
    multiplier[r] = sum == 0.0f ? 0.0f : __fdividef(share, sum);
    if (params.lse.data && place.there[r] && threadIdx.x % 4 == 0) {
      const int64_t at = (int64_t{info.batch} * in.query_heads + info.head) * in.queries.tokens + place.row[r];
      static_cast<float*>(params.lse.data)[at] = sum == 0.0f ? -INFINITY : (top + __log2f(sum)) * kLn2;
    }
  }
  if (in.gate.data) {
    if (params.o.data) store_results<T>(params.o.data, in, place, o, multiplier);
    apply_gate<T>(in, info, place, o);
  }
  store_results<T>(params.y.data, in, place, o, multiplier);
}

}  // namespace inlay::attention::cuda
