// Kernels of attention in AVX-512.
#include "attention/cpu/tier_impl.h"
#include "common/cpu/vec_avx512.h"

namespace inlay::attention {

const Kernels kAvx512Kernels = kernels_of<cpu::Avx512Vec>();

}  // namespace inlay::attention
