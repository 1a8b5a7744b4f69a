#include "rope/cuda/register_forward.cuh"

namespace inlay::rope::cuda {

template Launch<ForwardParams> register_forward<__half, Form::packed>(const ForwardParams&, int);
template Launch<ForwardParams> register_forward<__half, Form::stepwise>(const ForwardParams&, int);
template Launch<ForwardParams> register_forward<__half, Form::wide>(const ForwardParams&, int);

}  // namespace inlay::rope::cuda
