#include "norm/cuda/register_backward.cuh"

namespace inlay::norm::cuda {
template Launch<BackwardParams> register_backward<__nv_bfloat16, Role::gated>(const BackwardParams&, int);
}
