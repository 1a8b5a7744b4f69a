// The forward of the rule in chunks.
#pragma once

#include "gdn/cuda/chunk_launch.cuh"

namespace inlay::gdn::cuda {

template <typename T, int kKeys>
void chunk_forward(const ForwardParams& params, void* stream) {
  const Inputs& in = params.inputs;
  const bool aligned = aligned_rows(in.q) && aligned_rows(in.k) && aligned_rows(in.v);
  const ScanParams p{{in, ChunkScratch(in, params.scratch).prepared, aligned},
                     params.final_state,
                     params.o,
                     nullptr,
                     value_rows(in.v, in),
                     value_rows(params.o, in)};
  prepare<T, kKeys>(p.chunk, stream);
  with_scan_groups<kKeys>(in, [&](auto groups) {
    constexpr int kGroups = decltype(groups)::value;
    using Memory = ScanForwardMemory<T, kKeys, kGroups, Scan::outputs>;
    start_scan<scan_kernel<T, kKeys, kGroups, Scan::outputs>, kGroups, Memory::kBytes>(p, stream);
  });
}

}  // namespace inlay::gdn::cuda
