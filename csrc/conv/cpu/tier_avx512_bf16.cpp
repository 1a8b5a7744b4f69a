// Conv kernels in AVX-512 with its bfloat16 conversions.
#include "common/cpu/vec_avx512.h"
#include "conv/cpu/kernels_impl.h"

namespace inlay::conv {

constexpr Kernels kAvx512Bf16Kernels = kernels_of<cpu::Avx512Vec>();

}  // namespace inlay::conv
