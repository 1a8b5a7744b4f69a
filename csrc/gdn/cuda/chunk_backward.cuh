// The backward of the rule in chunks: the states once more, the walk back, then all other gradients.
#pragma once

#include "gdn/cuda/chunk_launch.cuh"
#include "gdn/cuda/gradients.cuh"
#include "gdn/cuda/scan_backward.cuh"

namespace inlay::gdn::cuda {

template <typename T, int kKeys, int kGroups>
void scans(const ScanParams& states, const ScanBackwardParams& gradients, void* stream) {
  constexpr int kThreads = ScanTeam<kGroups>::kThreads;
  const dim3 grid(scan_blocks<kGroups>(states.chunk.inputs));
  start<scan_kernel<T, kKeys, kGroups, Scan::states>, kThreads,
        ScanForwardMemory<T, kKeys, kGroups, Scan::states>::kBytes>(states, grid, stream);
  start<scan_backward_kernel<T, kKeys, kGroups>, kThreads, ScanBackwardMemory<T, kKeys, kGroups>::kBytes>(gradients,
                                                                                                          grid, stream);
}

template <typename T, int kKeys>
void chunk_backward(const BackwardParams& params, void* stream) {
  const Inputs& in = params.inputs;
  if (in.sequences.count * in.value_heads == 0) return;
  const BackwardScratch scratch(in, params.scratch);
  const bool aligned = aligned_rows(in.q) && aligned_rows(in.k) && aligned_rows(in.v) && aligned_rows(params.dout);
  const ChunkParams chunk{in, scratch.prepared, aligned};
  prepare<T, kKeys>(chunk, stream);
  const ScanParams states{chunk, {}, {scratch.u, in.q.dtype}, scratch.states};
  const ScanBackwardParams back{chunk,     params.dout, params.dfinal_state, params.dinitial_state,
                                params.dv, scratch.w,   scratch.dstates};
  with_scan_groups<kKeys>(in, [&](auto groups) { scans<T, kKeys, decltype(groups)::value>(states, back, stream); });
  const GradientParams rest{chunk,           params.dout, scratch.u, scratch.w, scratch.states,
                            scratch.dstates, params.dq,   params.dk, params.dg, params.dbeta};
  const int64_t blocks = in.sequences.chunk_bound(kChunk) * in.key_heads;
  if (blocks == 0 || in.sequences.tokens == 0) return;
  start<gradients_kernel<T, kKeys>, kGradientThreads, GradientMemory<T, kKeys>::kBytes>(
      rest, dim3(static_cast<unsigned>(blocks)), stream);
}

}  // namespace inlay::gdn::cuda
