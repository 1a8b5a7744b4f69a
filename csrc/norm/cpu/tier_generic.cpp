// Norm kernels in plain C++, and the only ones in float64.
#include "common/cpu/vec_generic.h"
#include "norm/cpu/backward_impl.h"
#include "norm/cpu/forward_impl.h"

namespace inlay::norm {

using F32 = cpu::GenericVec<float>;
using F64 = cpu::GenericVec<double>;

const Kernels kGenericKernels{forward<F32>, backward<F32>, sum_partials<F32>};
const Kernels kGenericF64Kernels{forward<F64>, backward<F64>, sum_partials<F64>};

}  // namespace inlay::norm
