// Kernels of the gated delta rule in plain C++, and the only ones in float64.
#include "common/cpu/vec_generic.h"
#include "gdn/cpu/tier_impl.h"

namespace inlay::gdn {

const Kernels kGenericKernels = kernels_of<cpu::GenericVec<float>>();
const Kernels kGenericF64Kernels = kernels_of<cpu::GenericVec<double>>();

}  // namespace inlay::gdn
