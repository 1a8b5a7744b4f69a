// Starting the Hopper kernels: a block for each multiprocessor.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/cuda/launch.cuh"
#include "moe/cuda/matrix_gradients.cuh"
#include "moe/cuda/row_products.cuh"
#include "moe/cuda/tile_launch.h"

namespace inlay::moe::cuda {

inline dim3 blocks_for(int64_t tiles) {
  const int64_t most = multiprocessor_count();
  return dim3(static_cast<unsigned>(tiles < 1 ? 1 : tiles < most ? tiles : most));
}

template <class Config>
void start_row_product(const RowProductArguments& arguments, int64_t tiles, void* stream) {
  static_assert(kTileSharedBytes<typename Config::Memory> <= 227 << 10);
  start<row_product_kernel<Config>, kTileThreads, kTileSharedBytes<typename Config::Memory>>(arguments,
                                                                                             blocks_for(tiles), stream);
}

template <class Config>
void start_matrix_gradient(const MatrixGradientArguments& arguments, void* stream) {
  start<matrix_gradient_kernel<Config>, kTileThreads, kTileSharedBytes<typename Config::Memory>>(
      arguments, blocks_for(arguments.tiles), stream);
}

}  // namespace inlay::moe::cuda
