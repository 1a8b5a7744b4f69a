#include "rope/cuda/register_forward.cuh"

namespace inlay::rope::cuda {

template Launch<ForwardParams> register_forward<__nv_bfloat16, Form::packed>(const ForwardParams&, int);
template Launch<ForwardParams> register_forward<__nv_bfloat16, Form::stepwise>(const ForwardParams&, int);
template Launch<ForwardParams> register_forward<__nv_bfloat16, Form::wide>(const ForwardParams&, int);

}  // namespace inlay::rope::cuda
