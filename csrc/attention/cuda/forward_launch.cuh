// Starting the forward: tensor maps, the order of the tiles, the grid.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/cuda/forward.cuh"
#include "attention/cuda/launch.h"
#include "attention/cuda/scratch.h"

namespace inlay::attention::cuda {

// So many heads of q are worked on together: enough that the long tiles of causal attention start early, few enough
// that their keys and values are still in the L2 cache when the last queries come.
constexpr int64_t kHeadsTogether = 32;

// Whether tiles of one place take equally long wherever they are.
inline bool tiles_are_alike(const Inputs& in) {
  return in.window_left < 0 && in.window_right < 0 && !in.key_ranges.data && !in.kv_lengths.data && !in.queries.offsets;
}

inline TileOrder tile_order(const Inputs& in, int64_t queries, void* scratch) {
  const bool packed = in.queries.offsets != nullptr;
  const int64_t places = packed ? in.queries.chunk_bound(queries) : divide_up(in.queries.tokens, queries);
  const int64_t heads = packed ? in.query_heads : in.batch * in.query_heads;
  const int64_t head_group = divide_up(kHeadsTogether, in.group()) * in.group();
  if (places * heads >= int64_t{1} << 31) fail("attention: q must have fewer than 2^31 tiles");
  TileOrder order;
  order.count = static_cast<uint32_t>(places * heads);
  order.places = static_cast<uint32_t>(places);
  order.heads = static_cast<uint32_t>(heads);
  order.head_group = static_cast<uint32_t>(head_group < heads ? head_group : heads);
  order.group = static_cast<uint32_t>(in.group());
  order.taken = tiles_are_alike(in) ? nullptr : static_cast<unsigned*>(scratch);
  return order;
}

template <typename T, int kShape>
void forward_tiles(const ForwardParams& params, void* stream) {
  using C = ForwardConfig<T, kShape>;
  static_assert(kForwardSharedBytes<C> <= 227 << 10);
  const Inputs& in = params.inputs;
  ForwardArguments arguments;
  arguments.params = params;
  arguments.q = make_tensor_map({in.q, in.batch, in.queries.tokens, in.query_heads, in.head_dim, C::kQueries});
  // Without keys nothing is fetched, but a map wants a place in memory.
  const bool any = in.keys.tokens > 0;
  arguments.k = make_tensor_map({any ? in.k : in.q, in.batch, in.keys.tokens, in.key_heads, in.head_dim, C::kKeys});
  arguments.v = make_tensor_map({any ? in.v : in.q, in.batch, in.keys.tokens, in.key_heads, in.value_dim, C::kKeys});
  arguments.order = tile_order(in, C::kQueries, params.scratch);
  if (arguments.order.taken) {
    check(cudaMemsetAsync(arguments.order.taken, 0, sizeof(unsigned), static_cast<cudaStream_t>(stream)),
          "cudaMemsetAsync");
  }
  const int64_t blocks = multiprocessor_count();  // each fills one
  start<forward_kernel<C>, C::kThreads, kForwardSharedBytes<C>>(
      arguments, dim3(static_cast<unsigned>(blocks < arguments.order.count ? blocks : arguments.order.count)), stream);
}

}  // namespace inlay::attention::cuda
