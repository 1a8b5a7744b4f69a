// Starting the general kernels of one dtype.
#pragma once

#include "attention/cuda/general_division.h"

namespace inlay::attention::cuda {

template <auto Kernel, typename Arguments>
void start_blocks(const Arguments& arguments, int64_t blocks, void* stream) {
  if (blocks == 0) return;
  if (blocks >= int64_t{1} << 31) fail("attention: q, k and bias must have fewer than 2^31 tiles");
  const Division& division = arguments.division;
  start_sized<Kernel>(arguments, dim3(static_cast<unsigned>(blocks)), division.warps * 32, division.shared_bytes,
                      shared_memory_limit(), stream);
}

template <typename T>
void general_forward(const ForwardParams& params, void* stream) {
  const Inputs& in = params.inputs;
  const GeneralForwardArguments arguments{params, forward_division<T>(in, shared_memory_limit()), ScoreRule(in),
                                          MaskCells(in, params.scratch)};
  check_division(arguments.division);
  find_mask_cells(in, arguments.cells, stream);
  start_blocks<general_forward_kernel<T>>(arguments, in.queries.chunk_bound(arguments.division.rows) * in.query_heads,
                                          stream);
}

template <typename T, GeneralRole kRole>
void start_backward(GeneralBackwardArguments& arguments, void* stream) {
  const Inputs& in = arguments.params.inputs;
  const int64_t* const sizes = arguments.params.dbias.sizes;
  arguments.division = backward_division<T, kRole>(in);
  const Division& division = arguments.division;
  check_division(division);
  const auto bias_tiles = [&](int i, int tile) { return sizes[i] == 1 ? 1 : (sizes[i] + tile - 1) / tile; };
  const int64_t blocks = kRole == GeneralRole::keys ? in.keys.chunk_bound(division.rows) * in.key_heads
                         : kRole == GeneralRole::queries
                             ? in.queries.chunk_bound(division.rows) * in.query_heads
                             : sizes[0] * sizes[1] * bias_tiles(2, division.rows) * bias_tiles(3, division.streamed);
  start_blocks<general_backward_kernel<T, kRole>>(arguments, blocks, stream);
}

template <typename T>
void general_backward(const BackwardParams& params, void* stream) {
  const Inputs& in = params.inputs;
  const int streamed = backward_division<T, GeneralRole::keys>(in).streamed;
  const GeneralScratch scratch(in, streamed, params.scratch);
  const MaskCells cells(in, scratch.cells);
  GeneralBackwardArguments arguments{params, {}, ScoreRule(in), params.dout, scratch.rows, scratch.ranges, cells};
  if (scratch.dout) {
    arguments.dout = {scratch.dout, in.q.dtype, in.queries.tokens * in.query_heads * in.value_dim,
                      in.query_heads * in.value_dim, in.value_dim};
  }
  find_mask_cells(in, cells, stream);
  prepare_general_backward(params, streamed, scratch, stream);
  start_backward<T, GeneralRole::keys>(arguments, stream);
  start_backward<T, GeneralRole::queries>(arguments, stream);
  if (params.dbias.data) start_backward<T, GeneralRole::bias>(arguments, stream);
}

}  // namespace inlay::attention::cuda
