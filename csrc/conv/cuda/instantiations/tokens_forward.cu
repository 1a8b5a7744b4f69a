#include "conv/cuda/tokens_forward.cuh"

namespace inlay::conv::cuda {

template Plan<ForwardParams> tokens_forward<__nv_bfloat16>(const ForwardParams&);
template Plan<ForwardParams> tokens_forward<__half>(const ForwardParams&);
template Plan<ForwardParams> tokens_forward<float>(const ForwardParams&);

}  // namespace inlay::conv::cuda
