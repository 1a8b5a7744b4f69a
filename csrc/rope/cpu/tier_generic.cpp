// Rope kernels in plain C++, and the only ones in float64.
#include "common/cpu/vec_generic.h"
#include "rope/cpu/kernels_impl.h"

namespace inlay::rope {

constexpr Kernels kGenericKernels = kernels_of<cpu::GenericVec<float>>();
constexpr Kernels kGenericF64Kernels = kernels_of<cpu::GenericVec<double>>();

}  // namespace inlay::rope
