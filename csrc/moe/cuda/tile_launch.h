// What the instantiations of the Hopper kernels start.
#pragma once

#include "moe/cuda/matrix_arguments.h"
#include "moe/cuda/row_arguments.h"

namespace inlay::moe::cuda {

// `tiles`: at least as many as there are.
template <class Config>
void start_row_product(const RowProductArguments& arguments, int64_t tiles, void* stream);
template <class Config>
void start_matrix_gradient(const MatrixGradientArguments& arguments, void* stream);

}  // namespace inlay::moe::cuda
