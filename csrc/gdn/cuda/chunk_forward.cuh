// The forward of the rule in chunks.
#pragma once

#include "gdn/cuda/chunk_launch.cuh"

namespace inlay::gdn::cuda {

template <typename T, int kKeys, int kWarps>
void scan(const ScanParams& p, void* stream) {
  const unsigned blocks = scan_blocks<kWarps>(p.chunk.inputs);
  if (blocks == 0) return;
  constexpr int kBytes = ScanMemory<T, kKeys, kWarps, Scan::outputs>::kBytes;
  start<scan_kernel<T, kKeys, kWarps, Scan::outputs>, 32 * kWarps, kBytes>(p, dim3(blocks), stream);
}

template <typename T, int kKeys>
void chunk_forward(const ForwardParams& params, void* stream) {
  const Inputs& in = params.inputs;
  const bool aligned = aligned_rows(in.q) && aligned_rows(in.k) && aligned_rows(in.v);
  const ScanParams p{{in, ChunkScratch(in, params.scratch).prepared, aligned}, params.final_state, params.o, nullptr};
  prepare<T, kKeys>(p.chunk, stream);
  with_scan_warps(in, [&](auto warps) { scan<T, kKeys, decltype(warps)::value>(p, stream); });
}

}  // namespace inlay::gdn::cuda
