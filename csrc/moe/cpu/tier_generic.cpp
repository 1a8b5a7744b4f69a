// Kernels of the MoE family in plain C++, and the only ones in float64.
#include "common/cpu/vec_generic.h"
#include "moe/cpu/tier_impl.h"

namespace inlay::moe {

const Kernels kGenericKernels = kernels_of<cpu::GenericVec<float>>();
const Kernels kGenericF64Kernels = kernels_of<cpu::GenericVec<double>>();

}  // namespace inlay::moe
