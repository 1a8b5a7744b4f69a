// The general forward. A block has a tile of queries of one head and passes over the tiles of keys that they see:
//
//   s = q k^T, m = the largest score so far, p = 2^(s - m), o = o * 2^(old m - m) + p v
//
// q, one tile of k and one of v are in shared memory; while one of the latter is multiplied the other is on its way.
// p goes from one product to the next in registers.
#pragma once

#include "attention/cuda/general_cells.cuh"
#include "attention/cuda/general_rows.cuh"
#include "common/cuda/sigmoid.cuh"

namespace inlay::attention::cuda {

template <typename T>
struct GeneralForwardConfig {
  // A warp's rows. With 32 of them, what it reads of k and v from shared memory serves two products.
  static constexpr int kRowTiles = sizeof(T) == 2 ? 2 : 1;
  static constexpr int kRows = kRowTiles * 16;
  static constexpr int kWarps = sizeof(T) == 2 ? 4 : 8;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kBlocks = sizeof(T) == 2 ? 2 : 1;  // of a multiprocessor, at least
  static constexpr int kScoreTiles = 8;                   // of a tile of keys, at most
  static constexpr int kResultTiles = kWarpBytes / sizeof(T) / 8;
};

struct GeneralForwardArguments {
  ForwardParams params;
  Division division;
  ScoreRule rule;
  MaskCells cells;
};

// What is known of the softmax of one of this thread's queries so far: the sum, of its own columns, of
// 2^(factor * (s - top)).
struct SoftmaxRow {
  float top, sum;
};

// Scores become probabilities, not yet divided by their sums. Returns whether results must be multiplied by
// `rescaling`.
template <int kTiles>
__device__ __forceinline__ bool add_to_softmax(Accumulator (&s)[kTiles], SoftmaxRow (&rows)[2], const ScoreRule& rule,
                                               float (&rescaling)[2]) {
  bool moved = false;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float best = rows[r].top;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) best = fmaxf(best, fmaxf(s[i][2 * r], s[i][2 * r + 1]));
    best = fmaxf(best, __shfl_xor_sync(kAllLanes, best, 1));
    best = fmaxf(best, __shfl_xor_sync(kAllLanes, best, 2));
    rescaling[r] = best > rows[r].top ? exp2_fast((rows[r].top - best) * rule.factor) : 1.0f;
    moved |= best > rows[r].top;
    rows[r].top = best;
    const float taken = best == -INFINITY ? 0.0f : best;
    if (rule.inside) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        s[i][2 * r] -= taken;
        s[i][2 * r + 1] -= taken;
      }
    }
    const float offset = rule.inside ? 0.0f : -taken * rule.factor;
    float even = 0.0f, odd = 0.0f;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      even += s[i][2 * r] = exp2_fast(fmaf(s[i][2 * r], rule.factor, offset));
      odd += s[i][2 * r + 1] = exp2_fast(fmaf(s[i][2 * r + 1], rule.factor, offset));
    }
    rows[r].sum = rows[r].sum * rescaling[r] + (even + odd);
  }
  return __any_sync(kAllLanes, moved);
}

// What results are multiplied by, and the denominator's logarithm, from a query's softmax and its head's sink.
__device__ __forceinline__ float finish_softmax(const Inputs& in, const SoftmaxRow& row, int head, float unit,
                                                float& lse) {
  float sum = row.sum;
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  sum += __shfl_xor_sync(kAllLanes, sum, 2);
  float top = row.top * unit, share = 1.0f;
  if (in.sinks.data) {
    float sink[1];
    load_as_float(in.sinks.data, in.sinks.dtype, head, sink);
    const float larger = fmaxf(top, sink[0]);
    if (larger > -INFINITY) {
      share = exp2_fast((top - larger) * kLog2E);
      sum = sum * share + exp2_fast((sink[0] - larger) * kLog2E);
      top = larger;
    }
  }
  lse = sum == 0.0f ? -INFINITY : top + logf(sum);
  return sum == 0.0f ? 0.0f : in.dropout.keep_scale * share / sum;
}

template <typename T>
__global__
__launch_bounds__(GeneralForwardConfig<T>::kThreads, GeneralForwardConfig<T>::kBlocks) void general_forward_kernel(
    const __grid_constant__ GeneralForwardArguments arguments) {
  using C = GeneralForwardConfig<T>;
  constexpr int kRowTiles = C::kRowTiles, kScoreTiles = C::kScoreTiles, kResultTiles = C::kResultTiles;
  constexpr int kGroupPieces = kWarpBytes / kPieceBytes;
  const ForwardParams& params = arguments.params;
  const Inputs& in = params.inputs;
  const Division& division = arguments.division;
  const int lane = threadIdx.x % 32, warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0);
  const int groups = division.column_groups, group = warp % groups, keys = division.streamed;
  const int own_row = warp / groups * C::kRows;  // the warp's first of the block

  wait_for_predecessor();
  release_successor();
  // The last tiles first: causal ones take longest.
  const uint32_t tiles = static_cast<uint32_t>(in.queries.chunk_bound(division.rows));
  const RowPlace place = locate(in.queries, division.rows, tiles - 1 - blockIdx.x % tiles);
  BlockInfo& info = block_info(division);
  set_block_info(info, in, place, static_cast<int>(blockIdx.x / tiles), division.rows, true);
  if (info.count <= 0) return;
  const SequenceInfo& at = info.at;
  const QueryTileRange& range = info.range;
  const int head = info.head;
  const int depth = division.depth, width = division.width;
  const uint32_t shared = shared_address(dynamic_shared());
  const PieceTile q{shared, static_cast<uint32_t>(division.rows)};
  const PieceTile k{shared + static_cast<uint32_t>(division.streamed_at), static_cast<uint32_t>(keys)};
  const PieceTile v{k.base + static_cast<uint32_t>(division.stage_bytes), static_cast<uint32_t>(keys)};
  const PiecePart part(depth, group, groups);
  const auto fetch = [&](const PieceTile& tile, const TokenTensor& tensor, int number, int64_t columns) {
    const int first = number * keys;
    fetch_rows<T>(tile, tile.base == k.base ? depth : width,
                  rows_of<T>(tensor, at.batch, at.key_row + first, head / static_cast<int>(in.group()),
                             min(keys, at.key_count - first), columns),
                  C::kThreads);
    commit_copies();
  };

  Accumulator o[kRowTiles][kResultTiles];
  // Not by initialisers of its members: nvcc 13.0 gives them to the first row of an array of two dimensions alone.
  SoftmaxRow rows[kRowTiles][2];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) rows[m][0] = rows[m][1] = {-INFINITY, 0.0f};
  clear(o);
  const ScoreRule& rule = arguments.rule;
  const int end_tile = (range.highest + keys - 1) / keys;
  const auto seen_from = [&](int tile) {
    return first_seen_tile(arguments.cells, in.mask, {at.batch, head, info.first, division.rows}, tile, end_tile, keys);
  };
  SeenTile tile = seen_from(range.lowest / keys);
  if (tile.number < end_tile) {
    fetch_rows<T>(q, depth, rows_of<T>(in.q, at.batch, at.query_row + info.first, head, info.count, in.head_dim),
                  C::kThreads);
    fetch(k, in.k, tile.number, in.head_dim);
  }
#pragma unroll 1
  for (SeenTile next; tile.number < end_tile; tile = next) {
    wait_for_copies<0>();
    __syncthreads();  // k is there, and v of the tile before is no longer read
    fetch(v, in.v, tile.number, in.value_dim);
    next = seen_from(tile.number + 1);
    Accumulator s[kRowTiles][kScoreTiles];
    clear(s);
    add_scores_of<T, kRowTiles, kScoreTiles / 2>(keys / 16, s, q, own_row, k, part.first, part.end, in.allow_tf32);
    if (groups > 1) {
      __syncthreads();
      exchange_parts(s, shared + static_cast<uint32_t>(division.exchange_at), keys / 8, warp, groups);
    }
    wait_for_copies<0>();
    __syncthreads();  // v is there, and k is no longer read
    if (next.number < end_tile) fetch(k, in.k, next.number, in.head_dim);

    const int first_key = tile.number * keys;
    const bool partial = first_key < range.all_from || first_key + keys > range.all_to;
    ProbabilityFragments<T, kScoreTiles> p[kRowTiles];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const ScorePlace score_place{info.first + own_row + m * 16, first_key, head};
      finish_scores<T, false>(s[m], static_cast<Accumulator(*)[kScoreTiles]>(nullptr), rule, in, at, score_place,
                              tile.masked, partial);
#pragma unroll
      for (int i = 2; i < kScoreTiles; ++i) {
        if (i * 8 >= keys) s[m][i][0] = s[m][i][1] = s[m][i][2] = s[m][i][3] = -INFINITY;
      }
      float rescaling[2];
      if (add_to_softmax(s[m], rows[m], rule, rescaling)) {
#pragma unroll
        for (int i = 0; i < kResultTiles; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) o[m][i][j] *= rescaling[j / 2];
        }
      }
      if (in.dropout.seed) {
        each_dropped<false, kScoreTiles>(in, at, score_place, [&](int i, int j) { s[m][i][j] = 0.0f; });
      }
      p[m].set(s[m]);
    }
    add_values<T>(o, p, v, keys, group * kGroupPieces, min(width - group * kGroupPieces, kGroupPieces), in.allow_tf32);
  }

  const int first_column = group * (kWarpBytes / static_cast<int>(sizeof(T)));
  const int columns = static_cast<int>(in.value_dim);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    const int row = own_row + m * 16 + lane / 4;
    const auto data_of = [&](void* data) {
      return [=, &in, &at, &info](int r) {
        const int64_t token = int64_t{at.batch} * in.queries.tokens + at.query_row + info.first + row + 8 * r;
        return row + 8 * r < info.count ? static_cast<T*>(data) + (token * in.query_heads + info.head) * columns
                                        : nullptr;
      };
    };
    float multiplier[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float lse;
      multiplier[r] = finish_softmax(in, rows[m][r], info.head, rule.unit, lse);
      if (params.lse.data && group == 0 && lane % 4 == 0 && row + 8 * r < info.count) {
        const int64_t index = (int64_t{at.batch} * in.query_heads + info.head) * in.queries.tokens + at.query_row;
        static_cast<float*>(params.lse.data)[index + info.first + row + 8 * r] = lse;
      }
    }
    if (in.gate.data) {
      if (params.o.data) {
        store_results<T>(o[m], first_column, columns, multiplier, data_of(params.o.data));
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (row + 8 * r >= info.count) continue;
        const T* const gate = static_cast<const T*>(in.gate.data) +
                              in.gate.offset(at.batch, at.query_row + info.first + row + 8 * r, info.head) +
                              first_column + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < kResultTiles; ++i) {
          if (first_column + i * 8 >= columns) break;
          o[m][i][2 * r] *= sigmoid<T>(to_float(gate[i * 8]));
          o[m][i][2 * r + 1] *= sigmoid<T>(to_float(gate[i * 8 + 1]));
        }
      }
    }
    store_results<T>(o[m], first_column, columns, multiplier, data_of(params.y.data));
  }
}

}  // namespace inlay::attention::cuda
