// Rope kernels in AVX2, FMA and F16C.
#include "common/cpu/vec_avx2.h"
#include "rope/cpu/kernels_impl.h"

namespace inlay::rope {

constexpr Kernels kAvx2Kernels = kernels_of<cpu::Avx2Vec>();

}  // namespace inlay::rope
