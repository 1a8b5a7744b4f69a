// Kernels of attention in AVX2, FMA and F16C.
#include "attention/cpu/tier_impl.h"
#include "common/cpu/vec_avx2.h"

namespace inlay::attention {

const Kernels kAvx2Kernels = kernels_of<cpu::Avx2Vec>();

}  // namespace inlay::attention
