// From products of queries and keys to what the softmax sees: scale, softcap, bias, mask, what positions hide, dropout.
//
// Scores are tiles of 8 columns as products leave them (mma.cuh): thread 4 g + t of a warp has rows g and g + 8,
// columns 2t and 2t + 1. Rows are queries and columns keys, or, with kKeysAreRows, the other way round.
#pragma once

#include "attention/cuda/general.h"
#include "common/cuda/launch.cuh"
#include "common/cuda/mma.cuh"
#include "common/cuda/sigmoid.cuh"

namespace inlay::attention::cuda {

using namespace inlay::cuda;

constexpr unsigned kAllLanes = 0xffffffffu;

// Where a row of a tile lies among sequences: tile `number` of all sequences' tiles of `rows` rows.
struct RowPlace {
  int64_t sequence;
  int first;  // of the sequence
};

__device__ __forceinline__ RowPlace locate(const Sequences& sequences, int rows, int64_t number) {
  if (!sequences.offsets) {
    const uint32_t tiles = static_cast<uint32_t>((sequences.tokens + rows - 1) / rows);
    const uint32_t sequence = static_cast<uint32_t>(number) / tiles;
    return {sequence, static_cast<int>((static_cast<uint32_t>(number) - sequence * tiles) * rows)};
  }
  int64_t low = 0, high = sequences.count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (sequences.first_chunk(middle, rows) <= number) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return {low, static_cast<int>((number - sequences.first_chunk(low, rows)) * rows)};
}

// One sequence: its queries and its keys.
struct SequenceInfo {
  int sequence, batch;
  int query_row, query_count;  // the first query's token
  int key_row, key_count;      // the first key's token; visible keys
  int all_keys, diagonal;

  __device__ __forceinline__ SequenceInfo(const Inputs& in, int64_t number) {
    const Sequence queries = in.queries[number], keys = in.keys[number];
    sequence = static_cast<int>(number);
    batch = static_cast<int>(queries.batch);
    query_row = static_cast<int>(queries.begin);
    query_count = static_cast<int>(queries.end - queries.begin);
    key_row = static_cast<int>(keys.begin);
    all_keys = static_cast<int>(keys.end - keys.begin);
    key_count = static_cast<int>(in.key_count(number, keys));
    diagonal = all_keys - query_count;
  }

  __device__ __forceinline__ KeyRange visible(const Inputs& in, int query) const {
    return in.visible(query, key_count, diagonal, batch, query_row + query);
  }
};

// Of queries [first, first + count), by a whole warp.
__device__ __forceinline__ QueryTileRange range_of(const Inputs& in, const SequenceInfo& at, int first, int count) {
  constexpr int kFar = 0x7fffffff;
  QueryTileRange range{kFar, 0, 0, kFar};
  // Without key ranges both limits grow with the query: the first and the last query say all, even where they see
  // nothing themselves.
  const int step = in.key_ranges.data ? 1 : max(count - 1, 1);
  for (int i = static_cast<int>(threadIdx.x % 32) * step; i < count; i += 32 * step) {
    const KeyRange seen = at.visible(in, first + i);
    const int begin = static_cast<int>(seen.begin), end = static_cast<int>(seen.end);
    if (!in.key_ranges.data || !seen.empty()) {
      range.lowest = min(range.lowest, begin);
      range.highest = max(range.highest, end);
    }
    range.all_from = max(range.all_from, begin);
    range.all_to = min(range.all_to, end);
  }
  range.lowest = __reduce_min_sync(kAllLanes, range.lowest);
  range.highest = min(__reduce_max_sync(kAllLanes, range.highest), at.key_count);
  range.all_from = __reduce_max_sync(kAllLanes, range.all_from);
  range.all_to = __reduce_min_sync(kAllLanes, range.all_to);
  if (range.lowest >= range.highest) range.lowest = range.highest = 0;
  return range;
}

// What a block's threads know alike. In shared memory, as registers are short.
struct BlockInfo {
  SequenceInfo at;
  QueryTileRange range;  // of queries
  int head;              // of queries, or of keys
  int first, count;      // the block's rows, of the sequence
};

__device__ __forceinline__ BlockInfo& block_info(const Division& division) {
  return *reinterpret_cast<BlockInfo*>(dynamic_shared() + division.info_at);
}

// Of rows of queries, or of keys.
__device__ __forceinline__ void set_block_info(BlockInfo& info, const Inputs& in, const RowPlace& place, int head,
                                               int rows, bool of_queries) {
  if (threadIdx.x < 32) {
    const SequenceInfo at(in, place.sequence);
    const int count = min(rows, (of_queries ? at.query_count : at.all_keys) - place.first);
    QueryTileRange range{0, 0, 0, 0};
    if (of_queries) range = range_of(in, at, place.first, count);
    if (threadIdx.x == 0) info = {at, range, head, place.first, count};
  }
  __syncthreads();
}

// A tile of scores as one warp has it.
struct ScorePlace {
  int first_query, first_key;  // of the sequence: those of row 0 and column 0 of the warp's tile
  int head;
};

// For a 16-bit T to 2^-19, which is enough for the derivative as well. The one instruction for it, to 2^-11, is not.
template <typename T>
__device__ __forceinline__ float tanh_of(float x) {
  if constexpr (sizeof(T) == sizeof(float)) return tanhf(x);
  return fmaf(-2.0f, sigmoid<T>(-2.0f * x), 1.0f);
}

// Calls with_query(query, each_key) for each of the thread's queries, and each_key(visit) then visit(score, key) for
// its keys.
template <bool kKeysAreRows, int kTiles, typename WithQuery>
__device__ __forceinline__ void each_query(Accumulator (&s)[kTiles], WithQuery with_query) {
  const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  if constexpr (kKeysAreRows) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        with_query(i * 8 + column + odd, [&](auto visit) {
#pragma unroll
          for (int r = 0; r < 2; ++r) visit(s[i][2 * r + odd], row + 8 * r);
        });
      }
    }
  } else {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      with_query(row + 8 * r, [&](auto visit) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          visit(s[i][2 * r], i * 8 + column);
          visit(s[i][2 * r + 1], i * 8 + column + 1);
        }
      });
    }
  }
}

template <bool kKeysAreRows, int kTiles>
__device__ __forceinline__ void hide(Accumulator (&s)[kTiles], const Inputs& in, const SequenceInfo& at,
                                     const ScorePlace& place) {
  each_query<kKeysAreRows>(s, [&](int query, auto each_key) {
    unsigned begin = 0, keys = 0;
    if (place.first_query + query < at.query_count) {
      const KeyRange seen = at.visible(in, place.first_query + query);
      begin = static_cast<unsigned>(seen.begin) - static_cast<unsigned>(place.first_key);
      keys = static_cast<unsigned>(seen.end - seen.begin);
    }
    each_key([&](float& score, int key) {
      if (static_cast<unsigned>(key) - begin >= keys) score = -INFINITY;
    });
  });
}

// Whether two neighbouring keys' values can be read at once.
__device__ __forceinline__ bool reads_pairs(const ScoreTensor& tensor, const void* first, int64_t bytes) {
  return tensor.key_stride == 1 && tensor.query_stride % 2 == 0 &&
         reinterpret_cast<uintptr_t>(first) % static_cast<uintptr_t>(2 * bytes) == 0;
}

template <bool kKeysAreRows, typename E, int kTiles>
__device__ __forceinline__ void add_bias(Accumulator (&s)[kTiles], const Inputs& in, const SequenceInfo& at,
                                         const ScorePlace& place) {
  const ScoreTensor& bias = in.bias;
  const E* const first =
      static_cast<const E*>(bias.data) + bias.offset(at.batch, place.head, place.first_query, place.first_key);
  const int queries = at.query_count - place.first_query, keys = at.key_count - place.first_key;
  if (!kKeysAreRows && reads_pairs(bias, first, sizeof(E)) && keys >= kTiles * 8) {
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row + 8 * r >= queries) continue;
      const E* const own = first + (row + 8 * r) * bias.query_stride + column;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const Packed<E, 2> pair = *reinterpret_cast<const Packed<E, 2>*>(own + i * 8);
        s[i][2 * r] += to_float(pair.values[0]);
        s[i][2 * r + 1] += to_float(pair.values[1]);
      }
    }
    return;
  }
  each_query<kKeysAreRows>(s, [&](int query, auto each_key) {
    const E* const own = first + query * bias.query_stride;
    each_key([&](float& score, int key) {
      if (query < queries && key < keys) score += to_float(own[key * bias.key_stride]);
    });
  });
}

template <bool kKeysAreRows, int kTiles>
__device__ __forceinline__ void apply_mask(Accumulator (&s)[kTiles], const Inputs& in, const SequenceInfo& at,
                                           const ScorePlace& place) {
  const ScoreTensor& mask = in.mask;
  const uint8_t* const first =
      static_cast<const uint8_t*>(mask.data) + mask.offset(at.batch, place.head, place.first_query, place.first_key);
  const int queries = at.query_count - place.first_query, keys = at.key_count - place.first_key;
  if (!kKeysAreRows && reads_pairs(mask, first, 1) && keys >= kTiles * 8) {
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row + 8 * r >= queries) continue;
      const uint8_t* const own = first + (row + 8 * r) * mask.query_stride + column;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const uint16_t pair = *reinterpret_cast<const uint16_t*>(own + i * 8);
        if (!(pair & 0xff)) s[i][2 * r] = -INFINITY;
        if (!(pair >> 8)) s[i][2 * r + 1] = -INFINITY;
      }
    }
    return;
  }
  each_query<kKeysAreRows>(s, [&](int query, auto each_key) {
    const uint8_t* const own = first + query * mask.query_stride;
    each_key([&](float& score, int key) {
      if (query < queries && key < keys && !own[key * mask.key_stride]) score = -INFINITY;
    });
  });
}

// Scores from products, as ScoreRule says; hidden ones are -inf. `gradients`, unless null, become those of products
// where there is a softcap: they are multiplied by its derivatives. The mask is read where `masked`, and positions are
// compared where `partial`.
template <typename T, bool kKeysAreRows, int kTiles>
__device__ __forceinline__ void finish_scores(Accumulator (&s)[kTiles], Accumulator (*gradients)[kTiles],
                                              const ScoreRule& rule, const Inputs& in, const SequenceInfo& at,
                                              const ScorePlace& place, bool masked, bool partial) {
  if (rule.inside) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s[i][j] *= rule.inner;
    }
    if (rule.cap > 0.0f) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float t = tanh_of<T>(s[i][j]);
          s[i][j] = rule.cap * t;
          if (gradients) (*gradients)[i][j] *= fmaf(-t, t, 1.0f);
        }
      }
    }
    if (in.bias.data) {
      if (in.bias.dtype == DType::f32) {
        add_bias<kKeysAreRows, float>(s, in, at, place);
      } else {
        add_bias<kKeysAreRows, T>(s, in, at, place);
      }
    }
  }
  if (masked) apply_mask<kKeysAreRows>(s, in, at, place);
  if (partial) hide<kKeysAreRows>(s, in, at, place);
}

// Calls drop(score's number i of its tile, tile) for those that dropout takes away. `first_key` is a multiple of 16.
template <bool kKeysAreRows, int kTiles, typename Drop>
__device__ __forceinline__ void each_dropped(const Inputs& in, const SequenceInfo& at, const ScorePlace& place,
                                             Drop drop) {
  const Dropout& dropout = in.dropout;
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
  const int row = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  const auto numbers = [&](int query, int key, int of_quad) {
    Philox result = Dropout::numbers(seed, at.sequence, place.head, place.first_query + query, key / 32, of_quad);
    if (key % 32 != 0) {  // the second half of these 32 keys comes first
      result.words[0] = result.words[2];
      result.words[1] = result.words[3];
    }
    return result;
  };
  if constexpr (kKeysAreRows) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const Philox own = numbers(i * 8 + quad * 2 + odd, place.first_key, row / 2);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (!dropout.keeps(own, r, row % 2)) drop(i, 2 * r + odd);
        }
      }
    }
  } else {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int block = 0; block < kTiles; block += 4) {
        const Philox own = numbers(row + 8 * r, place.first_key + block * 8, quad);
#pragma unroll
        for (int n = 0; n < 4 && block + n < kTiles; ++n) {
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
            if (!dropout.keeps(own, n, odd)) drop(block + n, 2 * r + odd);
          }
        }
      }
    }
  }
}

}  // namespace inlay::attention::cuda
