// Kernels of the gated delta rule in AVX2, FMA and F16C.
#include "common/cpu/vec_avx2.h"
#include "gdn/cpu/tier_impl.h"

namespace inlay::gdn {

const Kernels kAvx2Kernels = kernels_of<cpu::Avx2Vec>();

}  // namespace inlay::gdn
