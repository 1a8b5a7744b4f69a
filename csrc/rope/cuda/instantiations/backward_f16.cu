#include "rope/cuda/register_backward.cuh"

namespace inlay::rope::cuda {
template BackwardLaunch register_backward<__half, __half>(const BackwardParams&, int);
}
