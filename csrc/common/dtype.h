// Element types, as kernels and bindings both name them.
#pragma once

#include <cstdint>

namespace inlay {

enum class DType : int32_t { f32, bf16, f16, f64 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// What sums over values of this dtype are kept in.
constexpr DType wide_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::bf16:
      return "bfloat16";
    case DType::f16:
      return "float16";
    case DType::f64:
      return "float64";
  }
  return "?";
}

}  // namespace inlay
