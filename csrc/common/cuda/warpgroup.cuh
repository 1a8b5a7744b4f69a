// Products of four warps, 64 rows at a time: on Hopper the tensor cores read operands from shared memory by themselves
// and work in the background; elsewhere each warp takes its 16 rows by itself, at once.
//
// Of c[64, N], and of an `a` in registers, warp i of the four has rows 16 i to 16 i + 15, laid out as in mma.cuh.
//
// Use: tiles are written, publish_shared() and a barrier; begin_products(), products, commit_products();
// wait_for_products<n>() leaves the last n commits under way; keep() each c before it is read or written. Meanwhile
// nothing of a product may change: neither c, nor a in registers, nor the tiles.
#pragma once

#include "common/cuda/tile.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define INLAY_WGMMA
#endif

namespace inlay::cuda {

// An operand `a` is one of these; its summed dimension is cut in steps of 16.
struct InRegisters {
  const Fragment* steps;
};
template <typename T, int kRows, int kColumns>
struct RowsOf {  // all 64 rows of a tile; its columns are summed over
  TileView<T, kRows, kColumns> tile;
};
template <typename T, int kRows, int kColumns>
struct ColumnsOf {  // the first 64 columns of a tile; its rows are summed over
  TileView<T, kRows, kColumns> tile;
};

#ifdef INLAY_WGMMA

// Where a matrix lies: eight rows of 128 bytes, the next eight 1024 bytes on, permuted as Tile does. The same whether
// a tile's columns are summed over or, then called transposed, its rows.
template <typename T, int kRows, int kColumns>
__device__ __forceinline__ uint64_t descriptor(const TileView<T, kRows, kColumns>& tile, int row, int column) {
  const uint32_t address =
      tile.base + column / 64 * Tile<T, kRows, kColumns>::kPanelBytes + row * 128 + column % 64 * 2;
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | uint64_t{1} << 16 | uint64_t{64} << 32 | uint64_t{1} << 62;
}

// The registers of tiles of c, two at a time.
#define INLAY_C2(i)                                                                                                    \
  "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3]), "+f"(c[i + 1][0]), "+f"(c[i + 1][1]), "+f"(c[i + 1][2]), \
      "+f"(c[i + 1][3])
#define INLAY_C4(i) INLAY_C2(i), INLAY_C2(i + 2)

// The places of the operands after c's registers differ with their number.
#define INLAY_WGMMA_A(TYPE, N, C, A, B, P, TB, ...)                                                                    \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " P ", 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE \
               " {" C "}, {" A "}, " B ", p, 1, 1, " TB "; }"                                                          \
               : __VA_ARGS__                                                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransposedB))
#define INLAY_WGMMA_S(TYPE, N, C, A, B, P, TA, TB, ...)                                                                \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " P ", 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE \
               " {" C "}, " A ", " B ", p, 1, 1, " TA ", " TB "; }"                                                    \
               : __VA_ARGS__                                                                                           \
               : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposedA), "n"(kTransposedB))

#define INLAY_TYPES(PRODUCT, ...)           \
  if constexpr (kDType<T> == DType::bf16) { \
    PRODUCT("bf16", __VA_ARGS__);           \
  } else {                                  \
    PRODUCT("f16", __VA_ARGS__);            \
  }

template <typename T, int kTiles, bool kTransposedB>
__device__ __forceinline__ void start_product(Accumulator* c, const Fragment& a, uint64_t b, int accumulate) {
  if constexpr (kTiles == 8) {
    INLAY_TYPES(INLAY_WGMMA_A, "64",
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31",
                "%32, %33, %34, %35", "%36", "%37", "%38", INLAY_C4(0), INLAY_C4(4));
  } else {
    static_assert(kTiles == 0, "no such product");
  }
}

template <typename T, int kTiles, bool kTransposedA, bool kTransposedB>
__device__ __forceinline__ void start_product(Accumulator* c, uint64_t a, uint64_t b, int accumulate) {
  if constexpr (kTiles == 2) {
    INLAY_TYPES(INLAY_WGMMA_S, "16", "%0, %1, %2, %3, %4, %5, %6, %7", "%8", "%9", "%10", "%11", "%12", INLAY_C2(0));
  } else if constexpr (kTiles == 4) {
    INLAY_TYPES(INLAY_WGMMA_S, "32", "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15", "%16",
                "%17", "%18", "%19", "%20", INLAY_C4(0));
  } else if constexpr (kTiles == 8) {
    INLAY_TYPES(INLAY_WGMMA_S, "64",
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31",
                "%32", "%33", "%34", "%35", "%36", INLAY_C4(0), INLAY_C4(4));
  } else {
    static_assert(kTiles == 0, "no such product");
  }
}
#undef INLAY_TYPES
#undef INLAY_WGMMA_S
#undef INLAY_WGMMA_A
#undef INLAY_C4
#undef INLAY_C2

template <typename T, int kTiles, bool kTransposedB>
__device__ __forceinline__ void start_product(Accumulator* c, const InRegisters& a, int step, uint64_t b, bool fresh) {
  start_product<T, kTiles, kTransposedB>(c, a.steps[step], b, !fresh);
}

template <typename T, int kTiles, bool kTransposedB, int kRows, int kColumns>
__device__ __forceinline__ void start_product(Accumulator* c, const RowsOf<T, kRows, kColumns>& a, int step, uint64_t b,
                                              bool fresh) {
  start_product<T, kTiles, false, kTransposedB>(c, descriptor(a.tile, 0, step * 16), b, !fresh);
}

template <typename T, int kTiles, bool kTransposedB, int kRows, int kColumns>
__device__ __forceinline__ void start_product(Accumulator* c, const ColumnsOf<T, kRows, kColumns>& a, int step,
                                              uint64_t b, bool fresh) {
  start_product<T, kTiles, true, kTransposedB>(c, descriptor(a.tile, step * 16, 0), b, !fresh);
}

__device__ __forceinline__ void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of c from after the wait to before it.
template <int kTiles>
__device__ __forceinline__ void keep(Accumulator (&c)[kTiles]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    asm volatile("" : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])::"memory");
  }
}

#else

__device__ inline void publish_shared() {}
__device__ inline void begin_products() {}
__device__ inline void commit_products() {}
template <int kPending>
__device__ inline void wait_for_products() {}
template <int kTiles>
__device__ inline void keep(Accumulator (&)[kTiles]) {}

template <typename T>
__device__ inline void multiply_add_pair(Accumulator* c, const Fragment& a, const Fragment& b, bool fresh) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (fresh) {
#pragma unroll
      for (float& entry : c[i]) entry = 0.0f;
    }
    multiply_add<T>(c[i], a, b[2 * i], b[2 * i + 1]);
  }
}

__device__ inline void load_a(Fragment& r, const InRegisters& a, int step) {
#pragma unroll
  for (int i = 0; i < 4; ++i) r[i] = a.steps[step][i];
}

template <typename T, int kRows, int kColumns>
__device__ inline void load_a(Fragment& r, const RowsOf<T, kRows, kColumns>& a, int step) {
  a.tile.template load_rows_first<false>(r, threadIdx.x / 32 % 4 * 16, step * 16);
}

template <typename T, int kRows, int kColumns>
__device__ inline void load_a(Fragment& r, const ColumnsOf<T, kRows, kColumns>& a, int step) {
  a.tile.template load_columns_first<true>(r, step * 16, threadIdx.x / 32 % 4 * 16);
}

#endif

// c[64, 8 kTiles] += or, fresh, = a's step [64, 16] times the transpose of a tile's rows [row, row + 8 kTiles), of
// which the columns [column, column + 16) are summed over.
template <int kTiles, class A, typename T, int kRows, int kColumns>
__device__ __forceinline__ void multiply_by_rows(Accumulator* c, const A& a, int step,
                                                 const TileView<T, kRows, kColumns>& tile, int row, int column,
                                                 bool fresh = false) {
#ifdef INLAY_WGMMA
  start_product<T, kTiles, false>(c, a, step, descriptor(tile, row, column), fresh);
#else
  Fragment own, b;
  load_a(own, a, step);
#pragma unroll
  for (int pair = 0; pair < kTiles / 2; ++pair) {
    tile.template load_columns_first<false>(b, row + pair * 16, column);
    multiply_add_pair<T>(c + 2 * pair, own, b, fresh);
  }
#endif
}

// c[64, 8 kTiles] += or = a's step times a tile's columns [column, column + 8 kTiles), of which the rows [row, row +
// 16) are summed over. `column` is a multiple of 64 and kTiles at most 8.
template <int kTiles, class A, typename T, int kRows, int kColumns>
__device__ __forceinline__ void multiply_by_columns(Accumulator* c, const A& a, int step,
                                                    const TileView<T, kRows, kColumns>& tile, int row, int column,
                                                    bool fresh = false) {
#ifdef INLAY_WGMMA
  start_product<T, kTiles, true>(c, a, step, descriptor(tile, row, column), fresh);
#else
  Fragment own, b;
  load_a(own, a, step);
#pragma unroll
  for (int pair = 0; pair < kTiles / 2; ++pair) {
    tile.template load_rows_first<true>(b, row, column + pair * 16);
    multiply_add_pair<T>(c + 2 * pair, own, b, fresh);
  }
#endif
}

}  // namespace inlay::cuda
