#include "conv/cuda/tokens_backward.cuh"

namespace inlay::conv::cuda {
template Plan<BackwardParams> tokens_backward<__nv_bfloat16>(const BackwardParams&);
}
