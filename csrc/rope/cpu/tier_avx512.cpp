// Rope kernels in AVX-512 F, BW, VL and DQ.
#include "common/cpu/vec_avx512.h"
#include "rope/cpu/kernels_impl.h"

namespace inlay::rope {

constexpr Kernels kAvx512Kernels = kernels_of<cpu::Avx512Vec>();

}  // namespace inlay::rope
