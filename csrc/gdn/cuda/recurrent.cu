// Chooses the recurrent kernel for some parameters, and the steps of gdn/params.h, which it computes.
#include "gdn/cuda/aligned.h"
#include "gdn/cuda/recurrent.cuh"

namespace inlay::gdn {
namespace cuda {
namespace {

template <typename T, int kRows, int kColumnLanes>
void launch(RecurrentParams p, void* stream) {
  using Tile = StateTile<kRows, kColumnLanes>;
  const unsigned tiles = static_cast<unsigned>((p.inputs.value_dim + Tile::kColumns - 1) / Tile::kColumns);
  const unsigned heads = static_cast<unsigned>(p.inputs.value_heads);
  for (; p.first_sequence < p.inputs.sequences.count; p.first_sequence += kMaxGridSequences) {
    const int64_t left = p.inputs.sequences.count - p.first_sequence;
    const int64_t count = left < kMaxGridSequences ? left : kMaxGridSequences;
    start<recurrent_kernel<T, kRows, kColumnLanes>, Tile::kThreads>(p, dim3(tiles, heads, static_cast<unsigned>(count)),
                                                                    stream);
  }
}

// Few heads are spread over the chip in narrow tiles, and so are long sequences, in which blocks wait for themselves
// more than for memory. The numbers are the same.
bool is_wide(const RecurrentParams& p) {
  const Inputs& in = p.inputs;
  const int64_t heads = in.sequences.count * in.value_heads;
  return p.aligned && in.value_dim > kLaneColumns * kNarrow * 2 && in.sequences.tokens <= kBatchTokens<8> &&
         heads >= 2 * multiprocessor_count();
}

template <typename T>
void launch(const RecurrentParams& p, void* stream) {
  static_assert(kMaxHeadDim <= kGroups * 16 && kHeadDimMultiple == kPiece);
  // How many rows a thread has depends on K alone: it has a say in the order of the sums.
  if (p.inputs.key_dim <= kGroups * 4) {
    launch<T, 4, kNarrow>(p, stream);
  } else if (p.inputs.key_dim <= kGroups * 8) {
    is_wide(p) ? launch<T, 8, kWide>(p, stream) : launch<T, 8, kNarrow>(p, stream);
  } else {
    launch<T, 16, kNarrow>(p, stream);
  }
}

}  // namespace

void recurrent(RecurrentParams p, void* stream) {
  const Inputs& in = p.inputs;
  p.aligned = aligned_rows(in.q) && aligned_rows(in.k) && aligned_state(p.before) && aligned_state(p.after) &&
              aligned_pointer(p.every.data);
  switch (in.q.dtype) {
    case DType::bf16:
      return launch<__nv_bfloat16>(p, stream);
    case DType::f16:
      return launch<__half>(p, stream);
    case DType::f32:
      return launch<float>(p, stream);
    default:
      inlay::cuda::fail("inlay: q must be float32, bfloat16 or float16 on CUDA, got float64");
  }
}

}  // namespace cuda

void step(const StepParams& params, void* stream) {
  cuda::recurrent({params.inputs, params.o, params.state, params.state, params.states_out}, stream);
}

}  // namespace inlay::gdn
