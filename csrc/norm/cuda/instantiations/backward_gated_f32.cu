#include "norm/cuda/register_backward.cuh"

namespace inlay::norm::cuda {
template Launch<BackwardParams> register_backward<float, Role::gated>(const BackwardParams&, int);
}
