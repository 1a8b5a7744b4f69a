// How tiles of keys add to dq in turn, so that its bits are the same in every run: the last one that is visible first.
//
// What a turn takes is the latency of memory three times: the sums have to be there, it has to be said so, and the next
// block has to see it. Whoever computes does not wait for that: one thread for each group does, and it looks for the
// next tile's turn while the last one's sums are on their way.
#pragma once

#include "attention/cuda/backward_fetch.cuh"

namespace inlay::attention::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// What this thread has seen done is done for those who come next.
__device__ __forceinline__ void let_next_come(unsigned* turns) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(turns) : "memory");
}

// One group's halves of the tiles that its block adds to, in the order in which they are computed: of the heads that
// share the keys, each with all tiles, as nobody's turn may be left out. In few registers.
template <class C>
struct OwnTurns {
  unsigned* turns;  // of this half
  int tile, heads;  // of the sequence; how many heads are left
  int last, reach;  // the last tile of keys that any query sees; a query sees keys up to its number plus `reach`
  const KeyTileInfo& info;

  __device__ __forceinline__ OwnTurns(const BackwardArguments& arguments, const KeyTileInfo& of, int group)
      : tile(of.first_tile), info(of) {
    const Inputs& in = arguments.params.inputs;
    heads = static_cast<int>(in.group());
    const int first_head = of.batch * static_cast<int>(in.query_heads) + of.key_head * heads;
    turns = arguments.turns + int64_t{first_head * arguments.query_tiles + of.first_query_tile + tile} * 2 + group;
    constexpr int64_t kFar = 1 << 30;
    last = (of.key_count - 1) / C::kKeys;
    reach = static_cast<int>(in.window_right < 0 ? kFar : min(kFar, of.diagonal + in.window_right));
  }

  __device__ __forceinline__ bool there() const { return heads > 0; }
  __device__ __forceinline__ void step(int tiles_of_head) {
    turns += 2;
    if (++tile < info.end_tile) return;
    turns += int64_t{tiles_of_head - (info.end_tile - info.first_tile)} * 2;
    tile = info.first_tile;
    --heads;
  }
  // Tiles of keys behind this one go first.
  __device__ __forceinline__ bool is_next() const {
    const int behind = min(last, ((tile + 1) * C::kQueries - 1 + reach) / C::kKeys) - info.first_key / C::kKeys;
    unsigned seen;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(turns) : "memory");
    return seen == static_cast<unsigned>(behind);
  }
};

// By one thread for each group. Sums that a group hands over are added here; where it adds them itself, it is told of
// its turn (`free`), and tells that it has added (`full`).
template <class C>
__device__ __forceinline__ void add_in_turn(const BackwardArguments& arguments, SumControl& control,
                                            const KeyTileInfo& info, uint32_t sums, int group) {
  constexpr bool kAdds = C::kSumBytes > 0;
  OwnTurns<C> own(arguments, info, group);
  bool told = false;
#pragma unroll 1
  for (int phase = 0; own.there(); phase ^= 1) {
    if (!told) {
      while (!own.is_next()) {
      }
      if (!kAdds) arrive(control.free);
    }
    unsigned* const turns = own.turns;
    own.step(arguments.query_tiles);
    wait_at(control.full, phase);
    if (kAdds) {
      start_bulk_add(arguments.dq + (turns - arguments.turns) * (C::kUse.dq_floats() / 2), sums, C::kSumBytes);
      wait_for_stores();
      arrive(control.free);
    }
    told = own.there() && own.is_next();
    if (kAdds) {
      wait_until_stored();
    } else if (told) {
      arrive(control.free);
    }
    let_next_come(turns);
  }
}

#endif

}  // namespace inlay::attention::cuda
