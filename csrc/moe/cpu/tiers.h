// Chooses the kernels for this machine.
#pragma once

#include "common/cpu/launch.h"
#include "moe/cpu/kernels.h"

namespace inlay::moe {

// AMX has none of its own: the products are in float32, which tiles do not multiply.
inline const Kernels& kernels_for(DType dtype) {
  return dtype == DType::f64 ? kGenericF64Kernels : cpu::tier_in_use(INLAY_TIERS);
}

}  // namespace inlay::moe
