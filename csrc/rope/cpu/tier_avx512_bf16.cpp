// Rope kernels in AVX-512 with AVX512_BF16's conversion to bf16.
#include "common/cpu/vec_avx512.h"
#include "rope/cpu/kernels_impl.h"

namespace inlay::rope {

constexpr Kernels kAvx512Bf16Kernels = kernels_of<cpu::Avx512Vec>();

}  // namespace inlay::rope
