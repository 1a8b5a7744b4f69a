// From a dtype that is known at run time to a type.
#pragma once

#include "common/cpu/elements.h"

namespace inlay::cpu {
namespace {

// Calls body(E{}) with the element type of the dtype. Vectors of doubles know no other type than double.
template <class Vec, class Body>
INLAY_INLINE void with_dtype(DType dtype, Body body) {
  if constexpr (sizeof(typename Vec::Scalar) == sizeof(double)) {
    body(double{});
  } else if (dtype == DType::f32) {
    body(float{});
  } else if (dtype == DType::bf16) {
    body(bf16{});
  } else {
    body(f16{});
  }
}

}  // namespace
}  // namespace inlay::cpu
