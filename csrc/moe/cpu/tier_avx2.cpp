// Kernels of the MoE family in AVX2, FMA and F16C.
#include "common/cpu/vec_avx2.h"
#include "moe/cpu/tier_impl.h"

namespace inlay::moe {

const Kernels kAvx2Kernels = kernels_of<cpu::Avx2Vec>();

}  // namespace inlay::moe
