#include "rope/cuda/register_backward.cuh"

namespace inlay::rope::cuda {

template BackwardLaunch register_backward<__nv_bfloat16, __nv_bfloat16>(const BackwardParams&, int);
template BackwardLaunch register_backward<__nv_bfloat16, float>(const BackwardParams&, int);

}  // namespace inlay::rope::cuda
