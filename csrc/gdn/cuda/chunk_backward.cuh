// The backward of the rule in chunks: the states once more, the walk back, then all other gradients.
#pragma once

#include "gdn/cuda/chunk_launch.cuh"
#include "gdn/cuda/gradients.cuh"
#include "gdn/cuda/scan_backward.cuh"

namespace inlay::gdn::cuda {

template <typename T, int kKeys>
void chunk_backward(const BackwardParams& params, void* stream) {
  const Inputs& in = params.inputs;
  if (in.sequences.count * in.value_heads == 0) return;
  const BackwardScratch scratch(in, params.scratch);
  const bool aligned = aligned_rows(in.q) && aligned_rows(in.k) && aligned_rows(in.v) && aligned_rows(params.dout);
  const ChunkParams chunk{in, scratch.prepared, aligned};
  prepare<T, kKeys>(chunk, stream);
  const ScanParams states{chunk, {}, {scratch.u, in.q.dtype}, scratch.states, value_rows(in.v, in), {}};
  const ScanBackwardParams back{
      chunk,     params.dout,     params.dfinal_state,         params.dinitial_state,    params.dv,
      scratch.w, scratch.dstates, value_rows(params.dout, in), value_rows(params.dv, in)};
  with_scan_groups<kKeys>(in, [&](auto groups) {
    constexpr int kGroups = decltype(groups)::value;
    start_scan<scan_kernel<T, kKeys, kGroups, Scan::states>, kGroups,
               ScanForwardMemory<T, kKeys, kGroups, Scan::states>::kBytes>(states, stream);
    start_scan<scan_backward_kernel<T, kKeys, kGroups>, kGroups, ScanBackwardMemory<T, kKeys, kGroups>::kBytes>(back,
                                                                                                                stream);
  });
  const GradientParams rest{chunk,           params.dout, scratch.u, scratch.w, scratch.states,
                            scratch.dstates, params.dq,   params.dk, params.dg, params.dbeta};
  const int64_t blocks = in.sequences.chunk_bound(kChunk) * in.key_heads;
  if (blocks == 0 || in.sequences.tokens == 0) return;
  start<gradients_kernel<T, kKeys>, kGradientThreads, GradientMemory<T, kKeys>::kBytes>(
      rest, dim3(static_cast<unsigned>(blocks)), stream);
}

}  // namespace inlay::gdn::cuda
