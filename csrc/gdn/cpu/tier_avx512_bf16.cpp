// Kernels of the gated delta rule in AVX-512 with AVX512_BF16's conversion to bf16.
#include "common/cpu/vec_avx512.h"
#include "gdn/cpu/tier_impl.h"

namespace inlay::gdn {

const Kernels kAvx512Bf16Kernels = kernels_of<cpu::Avx512Vec>();

}  // namespace inlay::gdn
