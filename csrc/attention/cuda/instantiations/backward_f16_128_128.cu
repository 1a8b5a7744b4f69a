#include "attention/cuda/backward_launch.cuh"

namespace inlay::attention::cuda {

template void backward_tiles<__half, backward_shape(128, 128)>(const BackwardParams&, const BackwardScratch&, void*);

}  // namespace inlay::attention::cuda
