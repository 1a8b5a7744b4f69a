// Kernels of attention in plain C++, and the only ones in float64.
#include "attention/cpu/tier_impl.h"
#include "common/cpu/vec_generic.h"

namespace inlay::attention {

const Kernels kGenericKernels = kernels_of<cpu::GenericVec<float>>();
const Kernels kGenericF64Kernels = kernels_of<cpu::GenericVec<double>>();

}  // namespace inlay::attention
