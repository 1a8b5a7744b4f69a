// Chooses the kernels for this machine and splits the work over torch's threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "common/cpu/launch.h"
#include "common/cpu/memory.h"
#include "common/cpu/offsets.h"
#include "common/cpu/partial_sums.h"
#include "conv/cpu/kernels.h"

namespace inlay::conv {
namespace {

const Kernels& kernels_for(DType dtype) {
  return dtype == DType::f64 ? kGenericF64Kernels : cpu::tier_in_use(INLAY_TIERS);
}

void check_offsets(const char* op, const Sequences& sequences) {
  if (!sequences.boundaries.data) return;
  cpu::check_offsets(op, "cu_seqlens", sequences.count, sequences.time,
                     [&](int64_t i) { return sequences.boundaries[i]; });
}

// Splits `pieces` of about `elements` each; body(begin, end, scratch) has memory of its own.
template <class Body>
void in_parallel(DType dtype, int64_t pieces, int64_t elements, Body body) {
  const int64_t bytes = dtype == DType::f64 ? scratch_bytes<double>() : scratch_bytes<float>();
  torch::stable::parallel_for(0, pieces, cpu::grain(elements), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> scratch(new char[bytes]);
    body(begin, end, scratch.get());
  });
}

int64_t block_elements(int64_t channels, int64_t tokens) { return std::min(channels, kChannelBlock) * tokens; }

// The last width - 1 inputs of each sequence, some of them from its initial state where it is short.
template <class T>
void copy_final_states(const ForwardParams& p) {
  const int64_t columns = p.width - 1;
  in_parallel(p.dtype, p.sequences.count, p.channels * columns, [&](int64_t begin, int64_t end, char*) {
    for (int64_t index = begin; index < end; ++index) {
      const Sequence sequence = p.sequences[index];
      const int64_t batch = p.sequences.batch_of(index);
      for (int64_t channel = 0; channel < p.channels; ++channel) {
        for (int64_t column = 0; column < columns; ++column) {
          T value{};
          const int64_t position = sequence.end - columns + column;
          if (position >= sequence.begin) {
            value = static_cast<const T*>(p.x.data)[p.x.offset(batch, position, channel)];
          } else if (p.initial_state.data) {
            value = static_cast<const T*>(
                p.initial_state.data)[p.initial_state.offset(index, channel, p.state_column(sequence, position))];
          }
          static_cast<T*>(p.final_state.data)[p.final_state.offset(index, channel, column)] = value;
        }
      }
    }
  });
}

}  // namespace

void forward(const ForwardParams& p, void*) {
  check_offsets("causal_conv1d", p.sequences);
  const Kernels& kernels = kernels_for(p.dtype);
  const bool stream = cpu::prepare_outputs({{p.y.data, p.batch * p.time * p.channels * size_of(p.dtype)}});
  const int64_t tiles = p.batch * token_tiles(p.time);
  const int64_t pieces = p.time_contiguous ? p.batch * p.channels : channel_blocks(p.channels) * tiles;
  const int64_t elements = p.time_contiguous ? p.time : block_elements(p.channels, kTokenTile);
  if (p.time > 0) {
    in_parallel(p.dtype, pieces, elements,
                [&](int64_t begin, int64_t end, char* scratch) { kernels.forward(p, begin, end, scratch, stream); });
  }
  if (!p.final_state.data) return;
  switch (size_of(p.dtype)) {
    case 2:
      return copy_final_states<uint16_t>(p);
    case 4:
      return copy_final_states<uint32_t>(p);
    default:
      return copy_final_states<uint64_t>(p);
  }
}

// A function of the shape alone: the number of threads must have no say in the order of the sums. Enough groups to
// keep many threads busy, and enough tokens in each to make their sums cheap.
int64_t partial_rows(const BackwardParams& p) {
  return p.time_contiguous ? 1 : std::clamp<int64_t>(p.batch * p.time / kTokenTile, 1, 128);
}

void backward(const BackwardParams& p, void*) {
  check_offsets("causal_conv1d_bwd", p.sequences);
  const Kernels& kernels = kernels_for(p.dtype);
  const int64_t tokens = p.batch * p.time;
  const bool stream = cpu::prepare_outputs({{p.dx.data, tokens * p.channels * size_of(p.dtype)}});
  const int64_t pieces = p.time_contiguous ? p.channels : channel_blocks(p.channels) * p.partial_rows;
  const int64_t elements = p.time_contiguous ? tokens : block_elements(p.channels, tokens / p.partial_rows);
  in_parallel(p.dtype, pieces, elements,
              [&](int64_t begin, int64_t end, char* scratch) { kernels.backward(p, begin, end, scratch, stream); });
  if (p.dinitial_state.data) {
    const int64_t pieces = p.sequences.count * channel_blocks(p.channels);
    in_parallel(p.dtype, pieces, block_elements(p.channels, p.width), [&](int64_t begin, int64_t end, char* scratch) {
      kernels.initial_state_gradient(p, begin, end, scratch);
    });
  }
  if (!p.partials) return;
  const int64_t blocks = (p.channels + cpu::kSumBlock - 1) / cpu::kSumBlock;
  in_parallel(p.dtype, blocks, p.partial_rows * p.sums() * cpu::kSumBlock,
              [&](int64_t begin, int64_t end, char*) { kernels.sum_partials(p, begin, end); });
}

void step(const StepParams& p, void*) {
  const Kernels& kernels = kernels_for(p.dtype);
  const int64_t pieces = p.batch * channel_blocks(p.channels);
  in_parallel(p.dtype, pieces, block_elements(p.channels, p.time),
              [&](int64_t begin, int64_t end, char* scratch) { kernels.step(p, begin, end, scratch); });
}

}  // namespace inlay::conv
