// The general backward, as three kernels that compute scores anew and need no atomics: for dk and dv, for dq, and for a
// bias's gradient (GeneralRole).
//
//   P = 2^(S - lse);   dP = dO V^T;   dS = P (dP - delta);   dV = P^T dO;   dK = dS^T Q;   dQ = dS K
//
// Each has rows of two tensors in shared memory, k and v or q and dO, and passes over tiles of the other two. Its
// scores have these rows as rows, so that P and dS go from registers into the next products.
#pragma once

#include "attention/cuda/general_rows.cuh"
#include "attention/cuda/general_visits.cuh"

namespace inlay::attention::cuda {

template <typename T, GeneralRole kRole>
struct GeneralBackwardConfig {
  // A warp's rows. What it reads of the other side's tiles serves as many products; dk and dv leave no room for two.
  static constexpr int kRowTiles = kRole == GeneralRole::queries && sizeof(T) == 2 ? 2 : 1;
  static constexpr int kRows = kRowTiles * 16;
  static constexpr int kWarps = 8 / kRowTiles;  // at most
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kBlocks = kRole == GeneralRole::keys || sizeof(T) == 4 ? 1 : 2;  // of a multiprocessor, at least
  static constexpr int kScoreTiles = 4;  // of a tile of the other side, at most
  static constexpr int kResultTiles = kWarpBytes / sizeof(T) / 8;
  static constexpr bool kKeysAreRows = kRole == GeneralRole::keys;
  // What has no results of its own has one tile, unused.
  static constexpr int kFirstTiles = kRole == GeneralRole::bias ? 4 : kResultTiles;  // of dk or dq
  static constexpr int kSecondTiles = kKeysAreRows ? kResultTiles : 4;               // of dv
};

// A tile of a bias's gradient, [rows, columns] in shared memory, to where it belongs: added up over rows or columns
// where the bias has one of them.
__device__ __forceinline__ void store_bias_gradient(const ScoreGradient& dbias, const float* sums, int rows,
                                                    int columns, const int (&begin)[4], const int (&end)[4]) {
  const bool one_query = dbias.sizes[2] == 1, one_key = dbias.sizes[3] == 1;
  const int queries = one_query ? 1 : end[2] - begin[2], keys = one_key ? 1 : end[3] - begin[3];
  const int64_t batch = dbias.sizes[0] == 1 ? 0 : begin[0], head = dbias.sizes[1] == 1 ? 0 : begin[1];
  for (int i = static_cast<int>(threadIdx.x); i < queries * keys; i += static_cast<int>(blockDim.x)) {
    const int query = i / keys, key = i % keys;
    float total[1] = {0.0f};
    for (int row = one_query ? 0 : query; row < (one_query ? rows : query + 1); ++row) {
      for (int column = one_key ? 0 : key; column < (one_key ? columns : key + 1); ++column) {
        total[0] += sums[row * columns + column];
      }
    }
    const int64_t at = (batch * dbias.sizes[1] + head) * dbias.sizes[2] + (one_query ? 0 : begin[2] + query);
    store_from_float(dbias.data, dbias.dtype, at * dbias.sizes[3] + (one_key ? 0 : begin[3] + key), total);
  }
}

template <typename T, GeneralRole kRole>
__global__ __launch_bounds__(
    GeneralBackwardConfig<T, kRole>::kThreads,
    GeneralBackwardConfig<T, kRole>::kBlocks) void general_backward_kernel(const __grid_constant__
                                                                               GeneralBackwardArguments arguments) {
  using C = GeneralBackwardConfig<T, kRole>;
  constexpr int kRowTiles = C::kRowTiles, kTiles = C::kScoreTiles, kGroupPieces = kWarpBytes / kPieceBytes;
  constexpr bool kKeysAreRows = C::kKeysAreRows;
  const BackwardParams& params = arguments.params;
  const Inputs& in = params.inputs;
  const Division& division = arguments.division;
  const int lane = threadIdx.x % 32, warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0);
  const int groups = division.column_groups, group = warp % groups;
  const int own_row = warp / groups * C::kRows;  // the warp's first of the block
  const int streamed = division.streamed, threads = division.warps * 32;

  wait_for_predecessor();
  release_successor();
  Visits<kRole> visits(arguments);
  const int depth = division.depth, width = division.width;
  const uint32_t shared = shared_address(dynamic_shared());
  const PieceTile fixed_q{shared, static_cast<uint32_t>(division.rows)};                                     // q or k
  const PieceTile fixed_o{shared + tile_bytes(division.rows, depth), static_cast<uint32_t>(division.rows)};  // dO or v
  const auto streamed_q = [&](int stage) {
    return PieceTile{shared + static_cast<uint32_t>(division.streamed_at + stage * division.stage_bytes),
                     static_cast<uint32_t>(streamed)};
  };
  const auto streamed_o = [&](int stage) {
    return PieceTile{streamed_q(stage).base + tile_bytes(streamed, depth), static_cast<uint32_t>(streamed)};
  };
  const auto values_at = [&](int stage) { return streamed_o(stage).base + tile_bytes(streamed, width); };
  const auto values_of = [&](const SequenceInfo& at, const Visit& visit) {
    return arguments.rows + (int64_t{at.batch} * in.query_heads + visit.head) * in.queries.tokens + at.query_row +
           visit.first_query;
  };

  const auto fetch_queries = [&](const PieceTile& q, const PieceTile& dout) {
    const SequenceInfo& at = visits.at;
    const int first = visits.visit.first_query, count = min(static_cast<int>(q.rows), at.query_count - first);
    fetch_rows<T>(q, depth, rows_of<T>(in.q, at.batch, at.query_row + first, visits.visit.head, count, in.head_dim),
                  threads);
    fetch_rows<T>(dout, width,
                  rows_of<T>(arguments.dout, at.batch, at.query_row + first, visits.visit.head, count, in.value_dim),
                  threads);
  };
  const auto fetch_keys = [&](const PieceTile& k, const PieceTile& v) {
    const SequenceInfo& at = visits.at;
    const int first = visits.visit.first_key, count = min(static_cast<int>(k.rows), at.key_count - first);
    const int head = visits.visit.head / static_cast<int>(in.group());
    fetch_rows<T>(k, depth, rows_of<T>(in.k, at.batch, at.key_row + first, head, count, in.head_dim), threads);
    fetch_rows<T>(v, width, rows_of<T>(in.v, at.batch, at.key_row + first, head, count, in.value_dim), threads);
  };
  // Of the two sides' tiles the one that passes by; for a bias both.
  const auto fetch = [&](int stage) {
    if constexpr (kKeysAreRows) {
      fetch_queries(streamed_q(stage), streamed_o(stage));
      const int own = static_cast<int>(threadIdx.x);
      if (own < streamed) {
        const bool there = own < visits.at.query_count - visits.visit.first_query;
        const RowValues* const values = values_of(visits.at, visits.visit);
        copy_pair_async_or_zero(values_at(stage) + own * static_cast<uint32_t>(sizeof(RowValues)),
                                there ? values + own : arguments.rows, there);
      }
    } else {
      if constexpr (kRole == GeneralRole::bias) fetch_queries(fixed_q, fixed_o);
      fetch_keys(streamed_q(stage), streamed_o(stage));
    }
    commit_copies();
  };

  Accumulator first_result[kRowTiles][C::kFirstTiles], second_result[kRowTiles][C::kSecondTiles];
  clear(first_result);
  clear(second_result);
  const ScoreRule& rule = arguments.rule;
  const PiecePart depth_part(depth, group, groups), width_part(width, group, groups);
  const int own_depth = min(depth - group * kGroupPieces, kGroupPieces);
  const int own_width = min(width - group * kGroupPieces, kGroupPieces);

  int stage = 0;
  bool more = visits.next();
  if (more) {
    if constexpr (kKeysAreRows) fetch_keys(fixed_q, fixed_o);
    if constexpr (kRole == GeneralRole::queries) fetch_queries(fixed_q, fixed_o);
    fetch(0);
  }
#pragma unroll 1
  while (more) {
    const Visit visit = visits.visit;
    const decltype(visits.at) at = visits.at;  // a copy where the next visit may be elsewhere
    more = visits.next();
    if (division.stages > 1) {
      if (more) fetch(stage ^ 1);
      if (more) {
        wait_for_copies<1>();
      } else {
        wait_for_copies<0>();
      }
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();

    Accumulator products[2 * kRowTiles][kTiles];  // of q and k, then of dO and v
    clear(products);
    add_scores_of<T, kRowTiles, kTiles / 2>(streamed / 16, &products[0], fixed_q, own_row, streamed_q(stage),
                                            depth_part.first, depth_part.end, in.allow_tf32);
    add_scores_of<T, kRowTiles, kTiles / 2>(streamed / 16, &products[kRowTiles], fixed_o, own_row, streamed_o(stage),
                                            width_part.first, width_part.end, in.allow_tf32);
    if (groups > 1) {
      exchange_parts(products, shared + static_cast<uint32_t>(division.exchange_at), streamed / 8, warp, groups);
    }

    ProbabilityFragments<T, kTiles> fragments[kRowTiles];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      Accumulator(&p)[kTiles] = products[m];
      Accumulator(&ds)[kTiles] = products[kRowTiles + m];
      const int first_row = own_row + m * 16;
      const ScorePlace place{visit.first_query + (kKeysAreRows ? 0 : first_row),
                             visit.first_key + (kKeysAreRows ? first_row : 0), visit.head};
      uint32_t dropped = 0;
      if (in.dropout.seed) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) ds[i][j] *= in.dropout.keep_scale;
        }
        each_dropped<kKeysAreRows, kTiles>(in, at, place, [&](int i, int j) {
          ds[i][j] = 0.0f;
          dropped |= 1u << (i * 4 + j);
        });
      }
      // Each query's values, for it as a column or as a row.
      const auto with_values = [&](auto use) {
        if constexpr (kKeysAreRows) {
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            if (i * 8 >= streamed) break;
            const uint4 both = load_shared(values_at(stage) + lane % 4 * 16 + i * 64);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              use(i, j, __uint_as_float(j % 2 ? both.z : both.x), __uint_as_float(j % 2 ? both.w : both.y));
            }
          }
        } else {
          const RowValues* const values = values_of(at, visit) + first_row + lane / 4;
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            RowValues own{INFINITY, 0.0f};
            if (place.first_query + lane / 4 + 8 * r < at.query_count) own = values[8 * r];
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
              use(i, 2 * r, own.lse, own.delta);
              use(i, 2 * r + 1, own.lse, own.delta);
            }
          }
        }
      };
      with_values([&](int i, int j, float, float delta) { ds[i][j] -= delta; });
      finish_scores<T, kKeysAreRows>(p, kRole == GeneralRole::bias ? nullptr : &ds, rule, in, at, place, visit.masked,
                                     visit.partial);
      with_values([&](int i, int j, float lse, float) {
        if (rule.inside) p[i][j] -= lse;
        p[i][j] = exp2_fast(fmaf(p[i][j], rule.factor, rule.inside ? 0.0f : -lse));
        ds[i][j] *= p[i][j];
      });
      if constexpr (kRole == GeneralRole::bias) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) first_result[m][i][j] += ds[i][j];
        }
      } else {
        if constexpr (kKeysAreRows) {
          if (in.dropout.seed) {
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                if (dropped >> (i * 4 + j) & 1) p[i][j] = 0.0f;
              }
            }
          }
          fragments[m].set(p);
          add_values<T>(second_result, fragments, streamed_o(stage), streamed, group * kGroupPieces, own_width,
                        in.allow_tf32);
        }
        fragments[m].set(ds);
      }
    }
    if constexpr (kRole != GeneralRole::bias) {
      add_values<T>(first_result, fragments, streamed_q(stage), streamed, group * kGroupPieces, own_depth,
                    in.allow_tf32);
    }
    __syncthreads();  // what this tile was read from is free
    if (division.stages > 1) {
      stage ^= 1;
    } else if (more) {
      fetch(0);
    }
  }

  const SequenceInfo& at = visits.at;
  const int first_column = group * (kWarpBytes / static_cast<int>(sizeof(T)));
  const auto rows_at = [&](void* data, int row, int count, int64_t token, int64_t heads, int64_t head,
                           int64_t columns) {
    return [=](int r) {
      return row + 8 * r < count ? static_cast<T*>(data) + ((token + row + 8 * r) * heads + head) * columns : nullptr;
    };
  };
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    const int row = own_row + m * 16 + lane / 4;
    const float scale = static_cast<float>(in.scale);
    if constexpr (kKeysAreRows) {
      const int64_t token = int64_t{at.batch} * in.keys.tokens + at.key_row + visits.visit.first_key;
      const int count = at.all_keys - visits.visit.first_key;
      const float keep = in.dropout.keep_scale;
      store_results<T>(first_result[m], first_column, static_cast<int>(in.head_dim), {scale, scale},
                       rows_at(params.dk.data, row, count, token, in.key_heads, visits.key_head, in.head_dim));
      store_results<T>(second_result[m], first_column, static_cast<int>(in.value_dim), {keep, keep},
                       rows_at(params.dv.data, row, count, token, in.key_heads, visits.key_head, in.value_dim));
    } else if constexpr (kRole == GeneralRole::queries) {
      const int64_t token = int64_t{at.batch} * in.queries.tokens + at.query_row + visits.visit.first_query;
      store_results<T>(first_result[m], first_column, static_cast<int>(in.head_dim), {scale, scale},
                       rows_at(params.dq.data, row, at.query_count - visits.visit.first_query, token, in.query_heads,
                               visits.visit.head, in.head_dim));
    } else if (group == 0) {
      float* const sums = reinterpret_cast<float*>(dynamic_shared()) + row * streamed + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if (i * 8 >= streamed) break;
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[j / 2 * 8 * streamed + i * 8 + j % 2] = first_result[m][i][j];
      }
    }
  }
  if constexpr (kRole == GeneralRole::bias) {
    __syncthreads();
    store_bias_gradient(params.dbias, reinterpret_cast<const float*>(dynamic_shared()), division.rows, streamed,
                        visits.begin, visits.end);
  }
}

}  // namespace inlay::attention::cuda
