#include "conv/cuda/tokens_backward.cuh"

namespace inlay::conv::cuda {

template Plan<BackwardParams> tokens_backward<__nv_bfloat16>(const BackwardParams&);
template Plan<BackwardParams> tokens_backward<__half>(const BackwardParams&);
template Plan<BackwardParams> tokens_backward<float>(const BackwardParams&);

}  // namespace inlay::conv::cuda
