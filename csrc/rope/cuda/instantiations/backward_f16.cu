#include "rope/cuda/register_backward.cuh"

namespace inlay::rope::cuda {

template BackwardLaunch register_backward<__half, __half>(const BackwardParams&, int);
template BackwardLaunch register_backward<__half, float>(const BackwardParams&, int);

}  // namespace inlay::rope::cuda
