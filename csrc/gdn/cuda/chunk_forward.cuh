// The forward of the rule in chunks.
#pragma once

#include "gdn/cuda/chunk_launch.cuh"

namespace inlay::gdn::cuda {

template <typename T, int kKeys, int kGroups>
void scan(const ScanParams& p, void* stream) {
  const unsigned blocks = scan_blocks<kGroups>(p.chunk.inputs);
  if (blocks == 0) return;
  constexpr int kBytes = ScanForwardMemory<T, kKeys, kGroups, Scan::outputs>::kBytes;
  start<scan_kernel<T, kKeys, kGroups, Scan::outputs>, ScanTeam<kGroups>::kThreads, kBytes>(p, dim3(blocks), stream);
}

template <typename T, int kKeys>
void chunk_forward(const ForwardParams& params, void* stream) {
  const Inputs& in = params.inputs;
  const bool aligned = aligned_rows(in.q) && aligned_rows(in.k) && aligned_rows(in.v);
  const ScanParams p{{in, ChunkScratch(in, params.scratch).prepared, aligned}, params.final_state, params.o, nullptr};
  prepare<T, kKeys>(p.chunk, stream);
  with_scan_groups<kKeys>(in, [&](auto groups) { scan<T, kKeys, decltype(groups)::value>(p, stream); });
}

}  // namespace inlay::gdn::cuda
