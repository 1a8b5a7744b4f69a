#include "norm/cuda/register_forward.cuh"

namespace inlay::norm::cuda {
template Launch<ForwardParams> register_forward<float, Role::gated>(const ForwardParams&, int);
}
