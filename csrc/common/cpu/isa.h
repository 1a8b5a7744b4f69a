// Which instruction set the CPU kernels use, decided once per process.
#pragma once

#include <cstdint>
#include <vector>

// The introspection module asks the library that runs the kernels.
#define INLAY_EXPORT [[gnu::visibility("default")]]

namespace inlay::cpu {

// Each tier includes those before it. `generic` is plain C++ and runs anywhere.
enum class Isa : int32_t { generic, avx2, avx512, avx512_bf16, amx_bf16 };

INLAY_EXPORT const char* name_of(Isa isa);

// The tiers that this machine can run, from `generic` upwards.
INLAY_EXPORT std::vector<Isa> available_isas();

// The best available tier, at most the one that the environment variable INLAY_CPU_ISA names when first asked.
// Throws std::runtime_error when that variable names no tier.
INLAY_EXPORT Isa isa_in_use();

}  // namespace inlay::cpu
