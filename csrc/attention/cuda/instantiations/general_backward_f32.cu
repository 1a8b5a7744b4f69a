#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/cuda/general_launch.cuh"

namespace inlay::attention::cuda {

template void general_backward<float>(const BackwardParams&, void*);

}  // namespace inlay::attention::cuda
