// Kernels of the MoE family in AVX-512 with AVX512_BF16's conversion to bf16.
#include "common/cpu/vec_avx512.h"
#include "moe/cpu/tier_impl.h"

namespace inlay::moe {

const Kernels kAvx512Bf16Kernels = kernels_of<cpu::Avx512Vec>();

}  // namespace inlay::moe
