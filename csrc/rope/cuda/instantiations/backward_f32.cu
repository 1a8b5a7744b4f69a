#include "rope/cuda/register_backward.cuh"

namespace inlay::rope::cuda {

template BackwardLaunch register_backward<float, float>(const BackwardParams&, int);

}  // namespace inlay::rope::cuda
