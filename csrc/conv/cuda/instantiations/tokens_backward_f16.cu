#include "conv/cuda/tokens_backward.cuh"

namespace inlay::conv::cuda {
template Plan<BackwardParams> tokens_backward<__half>(const BackwardParams&);
}
