#include "rope/cuda/register_forward.cuh"

namespace inlay::rope::cuda {

template Launch<ForwardParams> register_forward<float, Form::wide>(const ForwardParams&, int);

}  // namespace inlay::rope::cuda
