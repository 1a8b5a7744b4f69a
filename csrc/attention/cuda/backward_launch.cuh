// Starting the backward's kernel over tiles of keys: tensor maps, the order of the tiles.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/cuda/backward.cuh"
#include "attention/cuda/backward_scratch.h"
#include "attention/cuda/launch.h"

namespace inlay::attention::cuda {

// So many bytes of q, its gradient's sums and the result's gradient are passed by together: few enough to be still in
// the L2 cache when the last tiles of keys come. Measured on an H200 at 16k tokens: 16 MiB take 2 to 4 % less time than
// 64, at head dimensions 64 and 128.
constexpr int64_t kQueryBytesTogether = int64_t{16} << 20;

inline KeyTileOrder key_tile_order(const BackwardParams& p, int64_t keys) {
  const Inputs& in = p.inputs;
  const bool packed = in.keys.offsets != nullptr;
  const int64_t places = packed ? in.keys.chunk_bound(keys) : divide_up(in.keys.tokens, keys);
  const int64_t heads = packed ? in.key_heads : in.batch * in.key_heads;
  const int64_t bytes = in.queries.tokens * in.group() * (in.head_dim * 6 + in.value_dim * 2);
  const int64_t head_group = bytes > 0 ? kQueryBytesTogether / bytes : 1;
  if (places * heads >= int64_t{1} << 31) fail("attention: k must have fewer than 2^31 tiles");
  KeyTileOrder order;
  order.count = static_cast<uint32_t>(places * heads);
  order.places = static_cast<uint32_t>(places);
  order.heads = static_cast<uint32_t>(heads);
  order.head_group = static_cast<uint32_t>(head_group < 1 ? 1 : head_group < heads ? head_group : heads);
  order.last_first = p.deterministic;  // a tile waits for those behind it to have added to dq
  return order;
}

template <typename T, int kShape>
void backward_tiles(const BackwardParams& params, const BackwardScratch& scratch, void* stream) {
  using C = BackwardConfig<T, kShape>;
  static_assert(kBackwardSharedBytes<C> <= 227 << 10);
  const Inputs& in = params.inputs;
  BackwardArguments arguments;
  arguments.params = params;
  arguments.q = make_tensor_map({in.q, in.batch, in.queries.tokens, in.query_heads, in.head_dim, C::kQueries});
  arguments.dout =
      make_tensor_map({params.dout, in.batch, in.queries.tokens, in.query_heads, in.value_dim, C::kQueries});
  arguments.k = make_tensor_map({in.k, in.batch, in.keys.tokens, in.key_heads, in.head_dim, C::kKeys});
  arguments.v = make_tensor_map({in.v, in.batch, in.keys.tokens, in.key_heads, in.value_dim, C::kKeys});
  arguments.order = key_tile_order(params, C::kKeys);
  arguments.log_scales = scratch.log_scales;
  arguments.deltas = scratch.deltas;
  arguments.dq = scratch.dq;
  arguments.turns = scratch.turns;
  arguments.query_tiles = static_cast<int>(query_tiles(in, C::kQueries));
  start<backward_kernel<C>, C::kThreads, kBackwardSharedBytes<C>>(arguments, dim3(arguments.order.count), stream);
}

}  // namespace inlay::attention::cuda
