#include "conv/cuda/channels_backward.cuh"

namespace inlay::conv::cuda {
template Plan<BackwardParams> channels_backward<__nv_bfloat16>(const BackwardParams&);
}
