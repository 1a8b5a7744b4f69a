#include "norm/cuda/register_forward.cuh"

namespace inlay::norm::cuda {
template Launch<ForwardParams> register_forward<__half, Role::gated>(const ForwardParams&, int);
}
