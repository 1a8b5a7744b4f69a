// What the launchers of the chunk kernels share.
#pragma once

#include <initializer_list>

#include "gdn/cuda/aligned.h"
#include "gdn/cuda/chunk.h"
#include "gdn/cuda/prepare.cuh"
#include "gdn/cuda/scan_forward.cuh"

namespace inlay::gdn::cuda {

// The boxes of a tensor [B, T, H, D].
inline BoxedTensor boxes_of(const TokenTensor& tensor, const Inputs& in, int64_t heads, int64_t columns) {
  return {tensor, in.sequences.offsets ? 1 : in.sequences.count, in.sequences.tokens, heads, columns, kTokens};
}

// Of q or k, and of v, o or a gradient of theirs.
inline BoxedTensor key_boxes(const TokenTensor& tensor, const Inputs& in) {
  return boxes_of(tensor, in, in.key_heads, in.key_dim);
}
inline BoxedTensor value_boxes(const TokenTensor& tensor, const Inputs& in) {
  return boxes_of(tensor, in, in.value_heads, in.value_dim);
}
inline BoxedTensor value_boxes(const OutputTensor& dense, const Inputs& in) {
  const int64_t row = in.value_heads * in.value_dim;
  return value_boxes(TokenTensor{dense.data, dense.dtype, in.sequences.tokens * row, row, in.value_dim}, in);
}

inline TokenRows token_rows(const ChunkParams& p, const BoxedTensor& boxes) {
  return p.boxed ? TokenRows{make_tensor_map(boxes)} : TokenRows{};
}

// `values`: the tensors of V's columns that the kernels read or write.
inline ChunkParams chunk_params(const Inputs& in, const Prepared& prepared, std::initializer_list<BoxedTensor> values) {
  const BoxedTensor q = key_boxes(in.q, in), k = key_boxes(in.k, in);
  ChunkParams p{in, prepared, aligned_rows(in.q) && aligned_rows(in.k), false, {}, {}};
  bool fits = is_hopper() && fits_tensor_map(q) && fits_tensor_map(k);
  for (const BoxedTensor& boxes : values) {
    p.aligned = p.aligned && aligned_rows(boxes.tensor);
    fits = fits && fits_tensor_map(boxes);
  }
  p.boxed = fits;
  p.q = token_rows(p, q);
  p.k = token_rows(p, k);
  return p;
}

template <typename T, int kKeys>
void prepare(const ChunkParams& p, void* stream) {
  const int64_t blocks = p.inputs.sequences.chunk_bound(kChunk) * p.inputs.key_heads;
  if (blocks == 0 || p.inputs.sequences.tokens == 0) return;
  start<prepare_kernel<T, kKeys>, kPrepareThreads, PrepareMemory<T, kKeys>::kBytes>(
      p, dim3(static_cast<unsigned>(blocks)), stream);
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
