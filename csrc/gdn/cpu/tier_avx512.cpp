// Kernels of the gated delta rule in AVX-512 F, BW, VL and DQ.
#include "common/cpu/vec_avx512.h"
#include "gdn/cpu/tier_impl.h"

namespace inlay::gdn {

const Kernels kAvx512Kernels = kernels_of<cpu::Avx512Vec>();

}  // namespace inlay::gdn
