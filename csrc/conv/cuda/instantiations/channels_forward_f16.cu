#include "conv/cuda/channels_forward.cuh"

namespace inlay::conv::cuda {
template Plan<ForwardParams> channels_forward<__half>(const ForwardParams&);
}
