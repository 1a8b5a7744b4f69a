// What the kernels of row_products.cuh are told.
#pragma once

#include <cuda.h>

#include "moe/cuda/tile_order.cuh"
#include "moe/params.h"

namespace inlay::moe::cuda {

enum class RowStep { kFirst, kResults, kActivations };

struct RowProductArguments {
  CUtensorMap rows;     // [capacity, depth], where they are not gathered
  CUtensorMap matrix;   // of every expert
  CUtensorMap results;  // [capacity, width] of kResults
  const void* gathered = nullptr;
  uint32_t gathered_stride = 0;     // in bytes
  const int32_t* tokens = nullptr;  // of padded rows
  TileTable table;
  int depth = 0;  // that is summed over
  int column_tiles = 0;
  bool halves = false;  // columns are those of gates, and of what they gate, apart

  Gating gating;
  int intermediate = 0;
  int width = 0;                   // of results
  ExpertMatrices bias;             // of columns; or absent
  VectorTensor weights;            // of slots; or absent
  const int32_t* slots = nullptr;  // of rows
  const void* saved_h = nullptr;   // [T * K, P]
  void* h = nullptr;               // [T * K, P]
  void* a = nullptr;               // [capacity, intermediate]
  void* dh = nullptr;              // [capacity, P]
  float* weight_parts = nullptr;   // [column_tiles, capacity]
  int64_t capacity = 0;
};

template <typename T_, RowStep kStep_, bool kTransposed_>
struct RowProductConfig {
  using T = T_;
  static constexpr RowStep kStep = kStep_;
  static constexpr bool kTransposed = kTransposed_;  // the matrix has the summed dimension as rows
  // Dealing costs registers, which those who store gradients do not have to spare, and gains nothing where little is
  // summed over.
  static constexpr bool kDeals = kStep == RowStep::kFirst;
  using Memory = TileMemory<64>;
  static constexpr bool kGathers = kStep == RowStep::kFirst || kStep == RowStep::kActivations;
};

}  // namespace inlay::moe::cuda
