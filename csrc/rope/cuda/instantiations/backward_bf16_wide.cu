#include "rope/cuda/register_backward.cuh"

namespace inlay::rope::cuda {
template BackwardLaunch register_backward<__nv_bfloat16, float>(const BackwardParams&, int);
}
