#include "common/cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace inlay::cpu {
namespace {

constexpr Isa kIsas[] = {Isa::generic, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx_bf16};

#ifdef __x86_64__

struct CpuId {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit CpuId(uint32_t leaf, uint32_t subleaf = 0) { __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx); }
};

constexpr bool has_all(uint64_t value, uint64_t bits) { return (value & bits) == bits; }
constexpr uint64_t bit(int index) { return uint64_t{1} << index; }

// The register states that the operating system saves when it switches threads (XCR0).
uint64_t saved_states() {
  uint32_t low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low | static_cast<uint64_t>(high) << 32;
}

// Linux hands out the tile registers on request only.
bool tiles_permitted() {
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Isa best_isa() {
  const CpuId basic(1);
  const bool has_xgetbv = has_all(basic.ecx, bit(27));
  const uint64_t states = has_xgetbv ? saved_states() : 0;
  const CpuId extended(7);
  const CpuId more(7, 1);

  const bool avx2 = has_all(basic.ecx, bit(12) | bit(28) | bit(29)) &&  // FMA, AVX, F16C
                    has_all(extended.ebx, bit(5)) && has_all(states, bit(1) | bit(2));
  if (!avx2) return Isa::generic;
  const bool avx512 = has_all(extended.ebx, bit(16) | bit(17) | bit(30) | bit(31)) &&  // F, DQ, BW, VL
                      has_all(states, bit(5) | bit(6) | bit(7));
  if (!avx512) return Isa::avx2;
  if (!has_all(more.eax, bit(5))) return Isa::avx512;
  const bool amx_bf16 = has_all(extended.edx, bit(22) | bit(24)) &&  // AMX-BF16, AMX-TILE
                        has_all(states, bit(17) | bit(18)) && tiles_permitted();
  return amx_bf16 ? Isa::amx_bf16 : Isa::avx512_bf16;
}

#else

Isa best_isa() { return Isa::generic; }

#endif

Isa capped_isa() {
  const Isa best = available_isas().back();
  const char* cap = std::getenv("INLAY_CPU_ISA");
  if (!cap || !*cap) return best;
  std::string known;
  for (const Isa isa : kIsas) {
    if (std::string(cap) == name_of(isa)) return isa < best ? isa : best;
    known += (known.empty() ? "" : ", ") + std::string(name_of(isa));
  }
  throw std::runtime_error("inlay: environment variable INLAY_CPU_ISA must be one of " + known + ", got \"" + cap +
                           "\"");
}

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::generic:
      return "generic";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::amx_bf16:
      return "amx_bf16";
  }
  return "?";
}

std::vector<Isa> available_isas() {
  static const Isa best = best_isa();
  std::vector<Isa> isas;
  for (const Isa isa : kIsas) {
    if (isa <= best) isas.push_back(isa);
  }
  return isas;
}

Isa isa_in_use() {
  static const Isa isa = capped_isa();
  return isa;
}

}  // namespace inlay::cpu
