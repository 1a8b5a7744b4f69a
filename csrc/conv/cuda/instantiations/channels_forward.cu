#include "conv/cuda/channels_forward.cuh"

namespace inlay::conv::cuda {

template Plan<ForwardParams> channels_forward<__nv_bfloat16>(const ForwardParams&);
template Plan<ForwardParams> channels_forward<__half>(const ForwardParams&);
template Plan<ForwardParams> channels_forward<float>(const ForwardParams&);

}  // namespace inlay::conv::cuda
