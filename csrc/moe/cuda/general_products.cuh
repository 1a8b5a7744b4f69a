// The products of rows with their experts' matrices. A block has 64 padded rows, which are one expert's, and up to 128
// columns; a step of the experts is given by where rows and matrices lie, and by what becomes of the sums.
#pragma once

#include "common/cuda/launch.cuh"
#include "moe/cuda/activation.cuh"
#include "moe/cuda/general_tile.cuh"

namespace inlay::moe::cuda {

enum class Finish : int32_t {
  plain,     // sums, and a bias where there is one
  activate,  // sums and bias are h
  gradient,  // sums are the gradients of activations, not weighted
};

// A matrix with a row for each padded row, or that row's token.
struct RowMatrix {
  const void* data = nullptr;
  int64_t row_stride = 0;
  bool of_tokens = false;
};

struct Products {
  Finish finish = Finish::plain;
  PaddedRows padded;
  Rows rows;
  RowMatrix left;
  int depth = 0;            // the summed dimension
  ExpertMatrices matrices;  // by rows of the depth, or of the results' columns
  bool depth_is_rows = false;
  int columns = 0;  // of the matrices' results
  ExpertMatrices bias;
  void* results = nullptr;  // plain: [capacity, columns]
  // Otherwise. Gates and what they gate are beside each other, or `intermediate` columns apart.
  Gating gating;
  int intermediate = 0;
  VectorTensor weights;
  void* h = nullptr;  // activate: written; gradient: read
  void* a = nullptr;
  void* dh = nullptr;
  float* weight_parts = nullptr;

  __host__ __device__ bool in_halves() const {
    return finish == Finish::activate && gating.gated && !gating.interleaved;
  }
  // A tile's columns; where gates and ups are apart, of each.
  __host__ __device__ int tile_columns() const { return in_halves() ? kGroupColumns : kTileColumns; }
  __host__ __device__ int column_tiles() const {
    return ((in_halves() ? intermediate : columns) + tile_columns() - 1) / tile_columns();
  }
};

// A block's tile.
struct ProductTile {
  int row;  // the first padded row
  int expert;
  int column;  // the first of each group
  int group_column[2];
  int group_columns[2];
  int number;  // of the tile among those of its rows
};

template <typename T>
__device__ __forceinline__ void sum_tile(TileSums& sums, const Products& p, const ProductTile& tile) {
  const T* const left = static_cast<const T*>(p.left.data);
  const int own = threadIdx.x / 8;
  const T* rows[kTileRows / 16];
  unsigned missing = 0;
#pragma unroll
  for (int i = 0; i < kTileRows / 16; ++i) {
    int row = tile.row + own + 16 * i;
    if (p.left.of_tokens) row = p.padded.tokens[row];
    missing |= row < 0 ? 1u << i : 0u;
    rows[i] = left + max(row, 0) * p.left.row_stride;
  }
  const bool left_aligned = is_aligned(left, p.left.row_stride * static_cast<int64_t>(sizeof(T)));
  const int64_t stride = p.matrices.row_stride;
  const T* groups[2];
  bool aligned[2];
#pragma unroll
  for (int g = 0; g < 2; ++g) {
    groups[g] = static_cast<const T*>(p.matrices.data) + tile.expert * p.matrices.expert_stride +
                (p.depth_is_rows ? tile.group_column[g] : tile.group_column[g] * stride);
    aligned[g] = is_aligned(groups[g], stride * static_cast<int64_t>(sizeof(T)));
    groups[g] += own * stride;
  }
  const auto fetch = [&](uint32_t stage, int step) {
    const int first = step * kDepth<T>, depth = p.depth - first;
    fetch_deep<T>(
        stage, depth, left_aligned, [&](int i) { return rows[i] + first; },
        [&](int i) { return (missing >> i & 1) == 0; });
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      const uint32_t to = stage + (1 + g) * kGroupBytes;
      if (p.depth_is_rows) {
        const T* const row = groups[g] + first * stride;
        fetch_across<T>(
            to, tile.group_columns[g], aligned[g], [&](int i) { return row + 16 * i * stride; },
            [&](int i) { return own + 16 * i < depth; });
      } else {
        const T* const row = groups[g] + first;
        fetch_deep<T>(
            to, depth, aligned[g], [&](int i) { return row + 16 * i * stride; },
            [&](int i) { return own + 16 * i < tile.group_columns[g]; });
      }
    }
  };
  sum_products(sums, (p.depth + kDepth<T> - 1) / kDepth<T>, fetch, [&](TileSums& to, uint32_t stage) {
    if (p.depth_is_rows) {
      add_products<T, true, false>(to, stage);
    } else {
      add_products<T, true, true>(to, stage);
    }
  });
}

__device__ __forceinline__ float bias_at(const ExpertMatrices& bias, int expert, int column) {
  float value[1] = {0.0f};
  if (bias.data) load_as_float(bias.data, bias.dtype, expert * bias.expert_stride + column, value);
  return value[0];
}

// Two values at once where they may be; `second`: there is one.
template <typename T>
__device__ __forceinline__ void store_two(T* to, float2 values, bool second, bool aligned) {
  if (aligned && second) {
    const float both[2] = {values.x, values.y};
    *reinterpret_cast<Packed<T, 2>*>(to) = pack<T>(both);
  } else {
    to[0] = from_float<T>(values.x);
    if (second) to[1] = from_float<T>(values.y);
  }
}

// A tile of sums as `end_row` rows of results from `to` on, `columns` of them or those of a tile. From `rows` on, rows
// are zero. A lane keeps to its columns.
template <typename T, typename Bias>
__device__ __forceinline__ void store_results(const float* sums, T* to, int64_t stride, int rows, int end_row,
                                              int columns, const Bias& bias) {
  const bool aligned = stride % 2 == 0 && reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
  for (int column = 2 * lane; column < min(columns, kTileColumns); column += 64) {
    const bool second = column + 1 < columns;
    const float even = bias(column), odd = second ? bias(column + 1) : 0.0f;
#pragma unroll 4
    for (int row = warp; row < end_row; row += kTileWarps) {
      float2 values = *reinterpret_cast<const float2*>(sums + row * kResultStride + column);
      values = row < rows ? make_float2(values.x + even, values.y + odd) : make_float2(0.0f, 0.0f);
      store_two(to + row * stride + column, values, second, aligned);
    }
  }
}

// A pair's gate is at `step` times its activation's column, what it gates `to_up` further on, where halves are `apart`.
struct PairPlaces {
  int step, to_up;

  __device__ PairPlaces(const Gating& gating, int apart)
      : step(gating.gated && gating.interleaved ? 2 : 1),
        to_up(!gating.gated        ? 0
              : gating.interleaved ? 1
                                   : apart) {}
};

template <typename T>
__device__ __forceinline__ void store_activations(const float* sums, const Products& p, const ProductTile& tile,
                                                  const ExpertRows& own, int rows) {
  const int features = p.gating.gated ? kGroupColumns : kTileColumns, first = tile.number * features;
  const PairPlaces shared(p.gating, kGroupColumns), global(p.gating, p.intermediate);
  const int64_t width = p.columns;
  T* const h = static_cast<T*>(p.h) + (own.first + (tile.row - own.padded)) * width + first * global.step;
  T* const a = static_cast<T*>(p.a) + static_cast<int64_t>(tile.row) * p.intermediate + first;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
  for (int feature = lane; feature < min(features, p.intermediate - first); feature += 32) {
    const int gate_column = (first + feature) * global.step;
    const float gate_bias = bias_at(p.bias, tile.expert, gate_column);
    const float up_bias = p.gating.gated ? bias_at(p.bias, tile.expert, gate_column + global.to_up) : 0.0f;
#pragma unroll 2
    for (int row = warp; row < kTileRows; row += kTileWarps) {
      const float* const from = sums + row * kResultStride + feature * shared.step;
      const float sums_of_pair[2] = {from[0] + gate_bias, from[shared.to_up] + up_bias};
      const Packed<T, 2> pair = pack<T>(sums_of_pair);
      if (p.h && row < rows) {
        T* const to = h + row * width + feature * global.step;
        to[0] = pair.values[0];
        if (p.gating.gated) to[global.to_up] = pair.values[1];
      }
      if (p.a) {
        const float value = activate<T>(p.gating, to_float(pair.values[0]), to_float(pair.values[1]));
        a[static_cast<int64_t>(row) * p.intermediate + feature] = from_float<T>(row < rows ? value : 0.0f);
      }
    }
  }
}

constexpr int kLaneFeatures = kTileColumns / 32;

// A lane's gates and what they gate, of one row of a tile.
template <typename T>
struct LanePairs {
  T gate[kLaneFeatures], up[kLaneFeatures];

  __device__ __forceinline__ void load(const T* row, const PairPlaces& places, int features) {
#pragma unroll
    for (int i = 0; i < kLaneFeatures; ++i) {
      const int feature = static_cast<int>(threadIdx.x) % 32 + 32 * i;
      gate[i] = up[i] = from_float<T>(0.0f);
      if (feature < features) {
        gate[i] = row[feature * places.step];
        up[i] = row[feature * places.step + places.to_up];
      }
    }
  }
};

template <typename T>
__device__ __forceinline__ void store_gradients(const float* sums, const Products& p, const ProductTile& tile,
                                                const ExpertRows& own, int rows) {
  const PairPlaces places(p.gating, p.intermediate);
  const int features = min(kTileColumns, p.intermediate - tile.column);
  const int64_t width = p.gating.gated ? 2 * int64_t{p.intermediate} : p.intermediate;
  const int first_row = own.first + (tile.row - own.padded);
  const T* const h = static_cast<const T*>(p.h) + first_row * width + tile.column * places.step;
  T* const dh = static_cast<T*>(p.dh) + tile.row * width + tile.column * places.step;
  T* const a = static_cast<T*>(p.a) + static_cast<int64_t>(tile.row) * p.intermediate + tile.column;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  LanePairs<T> next;
  if (warp < rows) next.load(h + warp * width, places, features);
#pragma unroll 1
  for (int row = warp; row < kTileRows; row += kTileWarps) {
    const LanePairs<T> pairs = next;
    if (row + kTileWarps < rows) next.load(h + (row + kTileWarps) * width, places, features);
    float weight[1] = {row < rows ? 1.0f : 0.0f};
    if (row < rows && p.weights.data) {
      load_as_float(p.weights.data, p.weights.dtype, p.rows.slots[first_row + row], weight);
    }
    float part = 0.0f;
    with_activation(p.gating.activation, [&](auto kind) {
#pragma unroll
      for (int i = 0; i < kLaneFeatures; ++i) {
        const int feature = lane + 32 * i;
        if (feature >= features) break;
        const float da = row < rows ? sums[row * kResultStride + feature] : 0.0f;
        float value = 0.0f, dgate = 0.0f, dup = 0.0f;
        if (row < rows) {
          value = activate_backward_as<T, decltype(kind)::value>(p.gating, to_float(pairs.gate[i]),
                                                                 to_float(pairs.up[i]), da * weight[0], dgate, dup);
        }
        part = fmaf(da, value, part);
        if (p.a) a[static_cast<int64_t>(row) * p.intermediate + feature] = from_float<T>(value * weight[0]);
        if (p.dh) {
          T* const to = dh + row * width + feature * places.step;
          to[0] = from_float<T>(dgate);
          if (p.gating.gated) to[places.to_up] = from_float<T>(dup);
        }
      }
    });
    if (p.weight_parts) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) part += __shfl_xor_sync(0xffffffffu, part, offset);
      if (lane == 0) p.weight_parts[tile.number * p.padded.capacity + tile.row + row] = part;
    }
  }
}

template <typename T>
__global__ __launch_bounds__(kTileThreads, 3) void products_kernel(const __grid_constant__ Products p) {
  wait_for_predecessor();
  release_successor();
  const int tiles = p.column_tiles(), unit = static_cast<int>(blockIdx.x) / tiles;
  ProductTile tile;
  tile.expert = p.padded.experts[unit];
  if (tile.expert < 0) return;
  tile.row = unit * kTileRows;
  tile.number = static_cast<int>(blockIdx.x) % tiles;
  tile.column = tile.number * p.tile_columns();
  const int apart = p.in_halves() ? p.intermediate : kGroupColumns;
#pragma unroll
  for (int g = 0; g < 2; ++g) {
    tile.group_column[g] = tile.column + g * apart;
    tile.group_columns[g] = p.in_halves() ? p.intermediate - tile.column : p.columns - tile.group_column[g];
  }
  TileSums sums;
  sum_tile<T>(sums, p, tile);
  const ExpertRows own(p.rows, p.padded, tile.expert);
  const int rows = own.count - (tile.row - own.padded);
  const float* const shared = share_sums(sums);
  if (p.finish == Finish::plain) {
    store_results(shared, static_cast<T*>(p.results) + static_cast<int64_t>(tile.row) * p.columns + tile.column,
                  p.columns, rows, kTileRows, p.columns - tile.column,
                  [&](int column) { return bias_at(p.bias, tile.expert, tile.column + column); });
  } else if (p.finish == Finish::activate) {
    store_activations<T>(shared, p, tile, own, rows);
  } else {
    store_gradients<T>(shared, p, tile, own, rows);
  }
}

template <typename T>
void start_products(const Products& p, void* stream) {
  const int64_t blocks = p.padded.capacity / kTileRows * p.column_tiles();
  if (blocks > 0) {
    start<products_kernel<T>, kTileThreads, kTileSharedBytes>(p, dim3(static_cast<unsigned>(blocks)), stream);
  }
}

}  // namespace inlay::moe::cuda
