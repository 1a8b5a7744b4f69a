#include "conv/cuda/tokens_forward.cuh"

namespace inlay::conv::cuda {
template Plan<ForwardParams> tokens_forward<__half>(const ForwardParams&);
}
