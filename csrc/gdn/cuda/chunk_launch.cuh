// What the launchers of the chunk kernels share.
#pragma once

#include "gdn/cuda/aligned.h"
#include "gdn/cuda/chunk.h"
#include "gdn/cuda/prepare.cuh"
#include "gdn/cuda/scan_forward.cuh"

namespace inlay::gdn::cuda {

inline TokenRows token_rows(const TokenTensor& tensor, const Inputs& in, int64_t heads, int64_t columns) {
  const int64_t batch = in.sequences.offsets ? 1 : in.sequences.count;
  const BoxedTensor boxes{tensor, batch, in.sequences.tokens, heads, columns, kTokens};
  TokenRows rows{};
  rows.boxed = has_tensor_maps() && fits_tensor_map(boxes);
  if (rows.boxed) rows.map = make_tensor_map(boxes);
  return rows;
}

// Of a tensor [B, T, Hv, V].
inline TokenRows value_rows(const TokenTensor& tensor, const Inputs& in) {
  return token_rows(tensor, in, in.value_heads, in.value_dim);
}

inline TokenRows value_rows(const OutputTensor& dense, const Inputs& in) {
  const int64_t row = in.value_heads * in.value_dim;
  return value_rows(TokenTensor{dense.data, dense.dtype, in.sequences.tokens * row, row, in.value_dim}, in);
}

template <typename T, int kKeys>
void prepare(const ChunkParams& p, void* stream) {
  const Inputs& in = p.inputs;
  const int64_t blocks = in.sequences.chunk_bound(kChunk) * in.key_heads;
  if (blocks == 0 || in.sequences.tokens == 0) return;
  const PrepareParams params{p, token_rows(in.q, in, in.key_heads, in.key_dim),
                             token_rows(in.k, in, in.key_heads, in.key_dim)};
  start<prepare_kernel<T, kKeys>, kPrepareThreads, PrepareMemory<T, kKeys>::kBytes>(
      params, dim3(static_cast<unsigned>(blocks)), stream);
}

template <int kGroups>
unsigned scan_blocks(const Inputs& in) {
  const int64_t parts = (in.value_dim + kGroups * kGroupColumns - 1) / (kGroups * kGroupColumns);
  return static_cast<unsigned>(in.sequences.count * in.value_heads * parts);
}

template <auto Kernel, int kGroups, int kBytes, typename Params>
void start_scan(const Params& params, void* stream) {
  const unsigned blocks = scan_blocks<kGroups>(params.chunk.inputs);
  if (blocks > 0) start<Kernel, ScanTeam<kGroups>::kThreads, kBytes>(params, dim3(blocks), stream);
}

// Calls use(how many groups of columns a scan's blocks have): two where that leaves enough blocks, and where two heads
// of this size have room.
template <int kKeys, class Use>
void with_scan_groups(const Inputs& in, Use use) {
  if constexpr (kKeys <= 128) {
    const int64_t heads = in.sequences.count * in.value_heads;
    const bool fills = 4 * heads * ((in.value_dim + 127) / 128) >= 3 * multiprocessor_count();
    if (in.value_dim > 64 && fills) return use(std::integral_constant<int, 2>());
  }
  return use(std::integral_constant<int, 1>());
}

}  // namespace inlay::gdn::cuda
