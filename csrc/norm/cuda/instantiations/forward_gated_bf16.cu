#include "norm/cuda/register_forward.cuh"

namespace inlay::norm::cuda {
template Launch<ForwardParams> register_forward<__nv_bfloat16, Role::gated>(const ForwardParams&, int);
}
