#include "rope/cuda/register_forward.cuh"

namespace inlay::rope::cuda {
template Launch<ForwardParams> register_forward<__nv_bfloat16, Form::packed>(const ForwardParams&, int);
}
