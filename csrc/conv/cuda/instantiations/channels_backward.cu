#include "conv/cuda/channels_backward.cuh"

namespace inlay::conv::cuda {

template Plan<BackwardParams> channels_backward<__nv_bfloat16>(const BackwardParams&);
template Plan<BackwardParams> channels_backward<__half>(const BackwardParams&);
template Plan<BackwardParams> channels_backward<float>(const BackwardParams&);

}  // namespace inlay::conv::cuda
