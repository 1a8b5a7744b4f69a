// From a dtype known at run time to an element type.
#pragma once

#include "common/cpu/elements.h"

namespace inlay::cpu {
namespace {

template <class T>
struct Type {
  using type = T;
};

// Calls body(Type<T>{}) with the element type of `dtype`, one of those that Vec loads.
template <class Vec, class Body>
INLAY_INLINE void with_element_type(DType dtype, Body body) {
  if constexpr (sizeof(typename Vec::Scalar) == sizeof(double)) {
    body(Type<double>{});
  } else if (dtype == DType::f32) {
    body(Type<float>{});
  } else if (dtype == DType::bf16) {
    body(Type<bf16>{});
  } else {
    body(Type<f16>{});
  }
}

INLAY_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace inlay::cpu
