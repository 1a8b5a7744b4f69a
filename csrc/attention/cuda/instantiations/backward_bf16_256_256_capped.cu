#include "attention/cuda/backward_launch.cuh"

namespace inlay::attention::cuda {

template void backward_tiles<__nv_bfloat16, backward_shape(256, 256, true)>(const BackwardParams&,
                                                                            const BackwardScratch&, void*);

}  // namespace inlay::attention::cuda
