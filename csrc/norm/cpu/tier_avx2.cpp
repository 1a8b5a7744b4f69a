// Norm kernels in AVX2, FMA and F16C.
#include "common/cpu/vec_avx2.h"
#include "norm/cpu/backward_impl.h"
#include "norm/cpu/forward_impl.h"

namespace inlay::norm {

const Kernels kAvx2Kernels{forward<cpu::Avx2Vec>, backward<cpu::Avx2Vec>, sum_partials<cpu::Avx2Vec>};

}  // namespace inlay::norm
