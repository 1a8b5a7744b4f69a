// Norm kernels in AVX-512 with AVX512_BF16's conversion to bf16.
#include "common/cpu/vec_avx512.h"
#include "norm/cpu/backward_impl.h"
#include "norm/cpu/forward_impl.h"

namespace inlay::norm {

const Kernels kAvx512Bf16Kernels{forward<cpu::Avx512Vec>, backward<cpu::Avx512Vec>, sum_partials<cpu::Avx512Vec>};

}  // namespace inlay::norm
