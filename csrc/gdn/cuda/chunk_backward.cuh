// The backward of the rule in chunks: the states once more, the walk back, then all other gradients.
#pragma once

#include "gdn/cuda/chunk_launch.cuh"
#include "gdn/cuda/gradients.cuh"
#include "gdn/cuda/scan_backward.cuh"

namespace inlay::gdn::cuda {

template <typename T, int kKeys, int kWarps>
void scans(const ScanParams& states, const ScanBackwardParams& gradients, void* stream) {
  const dim3 grid(scan_blocks<kWarps>(states.chunk.inputs));
  start<scan_kernel<T, kKeys, kWarps, Scan::states>, 32 * kWarps, ScanMemory<T, kKeys, kWarps, Scan::states>::kBytes>(
      states, grid, stream);
  start<scan_backward_kernel<T, kKeys, kWarps>, 32 * kWarps, ScanMemory<T, kKeys, kWarps, Scan::outputs>::kBytes>(
      gradients, grid, stream);
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
  with_scan_warps(in, [&](auto warps) { scans<T, kKeys, decltype(warps)::value>(states, back, stream); });
  const GradientParams rest{chunk,           params.dout, scratch.u, scratch.w, scratch.states,
                            scratch.dstates, params.dq,   params.dk, params.dg, params.dbeta};
  const int64_t blocks = in.sequences.chunk_bound(kChunk) * in.key_heads;
  if (blocks == 0 || in.sequences.tokens == 0) return;
  start<gradients_kernel<T, kKeys>, kGradientThreads, GradientMemory<T, kKeys>::kBytes>(
      rest, dim3(static_cast<unsigned>(blocks)), stream);
}

}  // namespace inlay::gdn::cuda
