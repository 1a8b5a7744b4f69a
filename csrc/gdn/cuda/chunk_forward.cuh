// The forward of the rule in chunks.
#pragma once

#include "gdn/cuda/chunk_launch.cuh"

namespace inlay::gdn::cuda {

template <typename T, int kKeys>
void chunk_forward(const ForwardParams& params, void* stream) {
  const Inputs& in = params.inputs;
  const BoxedTensor v = value_boxes(in.v, in), o = value_boxes(params.o, in);
  const ChunkParams chunk = chunk_params(in, ChunkScratch(in, params.scratch).prepared, {v, o});
  const ScanParams p{chunk, params.final_state, params.o, nullptr, token_rows(chunk, v), token_rows(chunk, o)};
  prepare<T, kKeys>(p.chunk, stream);
  with_scan_groups<kKeys>(in, [&](auto groups) {
    constexpr int kGroups = decltype(groups)::value;
    using Memory = ScanForwardMemory<T, kKeys, kGroups, Scan::outputs>;
    start_scan<scan_kernel<T, kKeys, kGroups, Scan::outputs>, kGroups, Memory::kBytes>(p, stream);
  });
}

}  // namespace inlay::gdn::cuda
