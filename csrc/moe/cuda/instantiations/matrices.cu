#include "moe/cuda/tile_launch.cuh"

namespace inlay::moe::cuda {

template void start_matrix_gradient<MatrixGradientConfig<__nv_bfloat16, false>>(const MatrixGradientArguments&, void*);
template void start_matrix_gradient<MatrixGradientConfig<__nv_bfloat16, true>>(const MatrixGradientArguments&, void*);
template void start_matrix_gradient<MatrixGradientConfig<__half, false>>(const MatrixGradientArguments&, void*);
template void start_matrix_gradient<MatrixGradientConfig<__half, true>>(const MatrixGradientArguments&, void*);

}  // namespace inlay::moe::cuda
