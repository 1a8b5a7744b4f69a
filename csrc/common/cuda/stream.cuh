// Loads of what is read once.
#pragma once

#include <cstdint>

namespace inlay::cuda {

// 16 bytes that take no place in L1. Loads stay before a wait_for_predecessor() that comes after them, which is why
// this is no ld.global.nc: the assembler moves those.
__device__ __forceinline__ uint4 load_streaming(const void* source) {
  uint4 words;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(source)
               : "memory");
  return words;
}

}  // namespace inlay::cuda
