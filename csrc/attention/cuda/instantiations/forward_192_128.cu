#include "attention/cuda/forward_launch.cuh"

namespace inlay::attention::cuda {

template void forward_tiles<__nv_bfloat16, forward_shape(192, 128)>(const ForwardParams&, void*);
template void forward_tiles<__half, forward_shape(192, 128)>(const ForwardParams&, void*);

}  // namespace inlay::attention::cuda
