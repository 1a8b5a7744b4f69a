// What the kernels of matrix_gradients.cuh are told.
#pragma once

#include <cuda.h>

#include "moe/cuda/tile_sizes.h"
#include "moe/params.h"

namespace inlay::moe::cuda {

struct MatrixGradientArguments {
  CUtensorMap columns;              // [capacity, columns_count]: dh, or a
  CUtensorMap gradient;             // of every expert, as it is stored
  const void* gathered = nullptr;   // [T, hidden]: x, or dy
  uint32_t gathered_stride = 0;     // in bytes
  const int32_t* tokens = nullptr;  // of padded rows
  const int32_t* units = nullptr;   // [E + 1] of padded rows before each expert
  int hidden = 0;
  int columns_count = 0;
  int hidden_tiles = 0;
  int column_tiles = 0;
  int tiles = 0;
};

template <typename T_, bool kTurnsOver_>
struct MatrixGradientConfig {
  using T = T_;
  using Memory = TileMemory<64>;
  static constexpr bool kTurnsOver = kTurnsOver_;  // the matrix is stored [columns, hidden]
};

}  // namespace inlay::moe::cuda
