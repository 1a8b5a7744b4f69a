// The function that gates and activations are made of.
#pragma once

namespace inlay::cuda {

// 1 / (1 + exp(-z)), right for infinite z. For float32 within 2 ulp; for a 16-bit T two instructions of the special
// function unit do, whose error (2^-20 where z matters) vanishes in T's rounding: such kernels are short
// of instructions.
template <typename T>
__device__ inline float sigmoid(float z) {
  if constexpr (sizeof(T) == sizeof(float)) return __fdividef(1.0f, 1.0f + expf(-z));
  constexpr float kLog2E = 1.4426950408889634f;
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(z * -kLog2E));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
  return inverse;
}

}  // namespace inlay::cuda
