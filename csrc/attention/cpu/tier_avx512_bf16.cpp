// Kernels of attention in AVX-512 with AVX512_BF16's conversion to bf16.
#include "attention/cpu/tier_impl.h"
#include "common/cpu/vec_avx512.h"

namespace inlay::attention {

const Kernels kAvx512Bf16Kernels = kernels_of<cpu::Avx512Vec>();

}  // namespace inlay::attention
