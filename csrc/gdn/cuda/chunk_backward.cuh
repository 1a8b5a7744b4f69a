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
  const BoxedTensor v = value_boxes(in.v, in), dout = value_boxes(params.dout, in), dv = value_boxes(params.dv, in);
  const ChunkParams chunk = chunk_params(in, scratch.prepared, {v, dout, dv});
  const TokenRows v_rows = token_rows(chunk, v), dout_rows = token_rows(chunk, dout);
  prepare<T, kKeys>(chunk, stream);
  const ScanParams states{chunk, {}, {scratch.u, in.q.dtype}, scratch.states, v_rows, {}};
  const ScanBackwardParams back{chunk,     params.dout,     params.dfinal_state, params.dinitial_state, params.dv,
                                scratch.w, scratch.dstates, dout_rows,           token_rows(chunk, dv)};
  with_scan_groups<kKeys>(in, [&](auto groups) {
    constexpr int kGroups = decltype(groups)::value;
    start_scan<scan_kernel<T, kKeys, kGroups, Scan::states>, kGroups,
               ScanForwardMemory<T, kKeys, kGroups, Scan::states>::kBytes>(states, stream);
    start_scan<scan_backward_kernel<T, kKeys, kGroups>, kGroups, ScanBackwardMemory<T, kKeys, kGroups>::kBytes>(back,
                                                                                                                stream);
  });
  const GradientParams rest{chunk,     params.dout, scratch.u, scratch.w,    scratch.states, scratch.dstates,
                            params.dq, params.dk,   params.dg, params.dbeta, v_rows,         dout_rows};
  const int64_t blocks = in.sequences.chunk_bound(kChunk) * in.key_heads;
  if (blocks == 0 || in.sequences.tokens == 0) return;
  start<gradients_kernel<T, kKeys>, kGradientThreads, GradientMemory<T, kKeys>::kBytes>(
      rest, dim3(static_cast<unsigned>(blocks)), stream);
}

}  // namespace inlay::gdn::cuda
