// Hopper's products of a warpgroup for tiles of many widths: 64 rows by up to 256 columns, 16 summed over at a time.
// What warpgroup.cuh says of their use holds here too. Matrices are named by descriptors, so that one instruction may
// span the panels of a tile, and loops over stages only add to an address.
#pragma once

#include "common/cuda/warpgroup.cuh"

#ifdef INLAY_WGMMA

namespace inlay::cuda {

// Where a matrix lies that is cut into panels of 64 columns, rows of 128 bytes, permuted as Tile does. `base` is a
// multiple of 1024. `panel_bytes` matters only to a product whose summed dimension is not the columns.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t base, uint32_t panel_bytes) {
  return static_cast<uint64_t>((base & 0x3ffff) >> 4) | static_cast<uint64_t>(panel_bytes >> 4) << 16 |
         uint64_t{64} << 32 | uint64_t{1} << 62;
}

// The matrix that lies so many bytes on, a multiple of 16.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// clang-format off
#define INLAY_R10(tens) \
  "%" #tens "0,%" #tens "1,%" #tens "2,%" #tens "3,%" #tens "4,%" #tens "5,%" #tens "6,%" #tens "7,%" #tens "8,%" #tens "9"
#define INLAY_R0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9"
#define INLAY_R20 INLAY_R0 "," INLAY_R10(1)
#define INLAY_R40 INLAY_R20 "," INLAY_R10(2) "," INLAY_R10(3)
#define INLAY_R80 INLAY_R40 "," INLAY_R10(4) "," INLAY_R10(5) "," INLAY_R10(6) "," INLAY_R10(7)
#define INLAY_R120 INLAY_R80 "," INLAY_R10(8) "," INLAY_R10(9) "," INLAY_R10(10) "," INLAY_R10(11)

#define INLAY_C1(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define INLAY_C2(i) INLAY_C1(i), INLAY_C1(i + 1)
#define INLAY_C4(i) INLAY_C2(i), INLAY_C2(i + 2)
#define INLAY_C8(i) INLAY_C4(i), INLAY_C4(i + 4)
#define INLAY_C16(i) INLAY_C8(i), INLAY_C8(i + 8)

// A row for each width: tiles of 8 columns, columns, c's registers by number, the seven operands after them, and c.
#define INLAY_WGMMA_WIDTHS(USE) \
  USE(4, "32", INLAY_R0 ",%10,%11,%12,%13,%14,%15", "%16", "%17", "%18", "%19", "%20", "%21", "%22", INLAY_C4(0)) \
  USE(5, "40", INLAY_R20, "%20", "%21", "%22", "%23", "%24", "%25", "%26", INLAY_C4(0), INLAY_C1(4)) \
  USE(8, "64", INLAY_R20 "," INLAY_R10(2) ",%30,%31", "%32", "%33", "%34", "%35", "%36", "%37", "%38", INLAY_C8(0)) \
  USE(10, "80", INLAY_R40, "%40", "%41", "%42", "%43", "%44", "%45", "%46", INLAY_C8(0), INLAY_C2(8)) \
  USE(12, "96", INLAY_R40 ",%40,%41,%42,%43,%44,%45,%46,%47", "%48", "%49", "%50", "%51", "%52", "%53", "%54", INLAY_C8(0), INLAY_C4(8)) \
  USE(14, "112", INLAY_R40 "," INLAY_R10(4) ",%50,%51,%52,%53,%54,%55", "%56", "%57", "%58", "%59", "%60", "%61", "%62", INLAY_C8(0), INLAY_C4(8), INLAY_C2(12)) \
  USE(16, "128", INLAY_R40 "," INLAY_R10(4) "," INLAY_R10(5) ",%60,%61,%62,%63", "%64", "%65", "%66", "%67", "%68", "%69", "%70", INLAY_C16(0)) \
  USE(20, "160", INLAY_R80, "%80", "%81", "%82", "%83", "%84", "%85", "%86", INLAY_C16(0), INLAY_C4(16)) \
  USE(22, "176", INLAY_R80 ",%80,%81,%82,%83,%84,%85,%86,%87", "%88", "%89", "%90", "%91", "%92", "%93", "%94", INLAY_C16(0), INLAY_C4(16), INLAY_C2(20)) \
  USE(24, "192", INLAY_R80 "," INLAY_R10(8) ",%90,%91,%92,%93,%94,%95", "%96", "%97", "%98", "%99", "%100", "%101", "%102", INLAY_C16(0), INLAY_C8(16)) \
  USE(32, "256", INLAY_R120 ",%120,%121,%122,%123,%124,%125,%126,%127", "%128", "%129", "%130", "%131", "%132", "%133", "%134", INLAY_C16(0), INLAY_C16(16))
// clang-format on

#define INLAY_WGMMA_SHARED(TYPE, N, C, O0, O1, O2, O3, O4, O5, O6, ...)                                        \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " O2 ", 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE \
               "." TYPE " {" C "}, " O0 ", " O1 ", p, 1, 1, " O3 ", " O4 "; }"                                 \
               : __VA_ARGS__                                                                                   \
               : "l"(a), "l"(b), "r"(accumulate), "n"(int{kTransposedA}), "n"(int{kTransposedB}))
#define INLAY_WGMMA_REGISTERS(TYPE, N, C, O0, O1, O2, O3, O4, O5, O6, ...)                                     \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " O5 ", 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE \
               "." TYPE " {" C "}, {" O0 ", " O1 ", " O2 ", " O3 "}, " O4 ", p, 1, 1, " O6 "; }"               \
               : __VA_ARGS__                                                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(int{kTransposedB}))

// c[64, 8 kTiles] += or, unless `accumulate`, = a b, where a [64, 16] is stored with the summed dimension as columns
// or, transposed, as rows; and b [16, 8 kTiles] with it as columns, that is as b's transpose, or, kTransposedB, as
// rows.
template <typename T, int kTiles, bool kTransposedA, bool kTransposedB>
__device__ __forceinline__ void start_product_of(Accumulator* c, uint64_t a, uint64_t b, int accumulate) {
#define INLAY_USE(TILES, ...)                  \
  if constexpr (kTiles == TILES) {             \
    if constexpr (kDType<T> == DType::bf16) {  \
      INLAY_WGMMA_SHARED("bf16", __VA_ARGS__); \
    } else {                                   \
      INLAY_WGMMA_SHARED("f16", __VA_ARGS__);  \
    }                                          \
  }
  INLAY_WGMMA_WIDTHS(INLAY_USE)
#undef INLAY_USE
}

// The same with a in registers.
template <typename T, int kTiles, bool kTransposedB>
__device__ __forceinline__ void start_product_of(Accumulator* c, const Fragment& a, uint64_t b, int accumulate) {
#define INLAY_USE(TILES, ...)                     \
  if constexpr (kTiles == TILES) {                \
    if constexpr (kDType<T> == DType::bf16) {     \
      INLAY_WGMMA_REGISTERS("bf16", __VA_ARGS__); \
    } else {                                      \
      INLAY_WGMMA_REGISTERS("f16", __VA_ARGS__);  \
    }                                             \
  }
  INLAY_WGMMA_WIDTHS(INLAY_USE)
#undef INLAY_USE
}

#undef INLAY_WGMMA_REGISTERS
#undef INLAY_WGMMA_SHARED
#undef INLAY_WGMMA_WIDTHS
#undef INLAY_C16
#undef INLAY_C8
#undef INLAY_C4
#undef INLAY_C2
#undef INLAY_C1
#undef INLAY_R120
#undef INLAY_R80
#undef INLAY_R40
#undef INLAY_R20
#undef INLAY_R0
#undef INLAY_R10

}  // namespace inlay::cuda

#endif
