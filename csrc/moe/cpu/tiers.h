// Chooses the kernels for this machine.
#pragma once

#include "common/cpu/isa.h"
#include "moe/cpu/kernels.h"

namespace inlay::moe {

inline const Kernels& kernels_for(DType dtype) {
  if (dtype == DType::f64) return kGenericF64Kernels;
  switch (cpu::isa_in_use()) {
#ifdef __x86_64__
    case cpu::Isa::amx_bf16:  // the products are in float32, which tiles do not multiply
    case cpu::Isa::avx512_bf16:
      return kAvx512Bf16Kernels;
    case cpu::Isa::avx512:
      return kAvx512Kernels;
    case cpu::Isa::avx2:
      return kAvx2Kernels;
#endif
    default:
      return kGenericKernels;
  }
}

}  // namespace inlay::moe
