// What the conv kernels of one instruction set offer; launch.cpp chooses among these tables.
#pragma once

#include "conv/params.h"

namespace inlay::conv {

// Work is cut into blocks of channels. With the channels innermost in memory a kernel walks through time, a block of
// channels and a tile of tokens in the cache; with the tokens innermost it walks over channels, a tile at a time.
constexpr int64_t kChannelBlock = 256;
constexpr int64_t kTokenTile = 64;
constexpr int64_t kRowTile = 512;  // tokens, where these are innermost

constexpr int64_t channel_blocks(int64_t channels) { return (channels + kChannelBlock - 1) / kChannelBlock; }
constexpr int64_t token_tiles(int64_t time) { return (time + kTokenTile - 1) / kTokenTile; }

// Memory of one thread. Rows of inputs have room for the widest element.
template <class Scalar>
struct Scratch {
  using InputRow = Scalar[kChannelBlock];
  Scalar weight[kMaxWidth][kChannelBlock];
  Scalar bias[kChannelBlock];
  InputRow zeros;
  InputRow state[kMaxWidth - 1];
  InputRow dfinal_state[kMaxWidth - 1];
  Scalar gradient[kTokenTile + kMaxWidth - 1][kChannelBlock];  // of the preactivation
};

template <class Scalar>
struct RowScratch {
  Scalar inputs[kRowTile + 2 * kMaxWidth];
  Scalar upstream[kRowTile + 2 * kMaxWidth];
  Scalar gradient[kRowTile + 2 * kMaxWidth];
  Scalar dfinal_state[kRowTile];
};

template <class Scalar>
constexpr int64_t scratch_bytes() {
  return sizeof(Scratch<Scalar>) > sizeof(RowScratch<Scalar>) ? sizeof(Scratch<Scalar>) : sizeof(RowScratch<Scalar>);
}
// Beyond this the C library asks the system for memory at every call, and for every page of it once more.
static_assert(scratch_bytes<float>() < 128 * 1024);

struct Kernels {
  // Channels innermost: pieces [begin, end) of channel_blocks x batch x token_tiles. Tokens innermost: of batch x
  // channels. `stream`: the outputs are too large for the caches.
  void (*forward)(const ForwardParams& params, int64_t begin, int64_t end, void* scratch, bool stream);
  // Channels innermost: pieces [begin, end) of channel_blocks x partial_rows. Tokens innermost: of channels.
  void (*backward)(const BackwardParams& params, int64_t begin, int64_t end, void* scratch, bool stream);
  // dweight and dbias from the partial sums: blocks [begin, end) of cpu::kSumBlock channels.
  void (*sum_partials)(const BackwardParams& params, int64_t begin, int64_t end);
  // dinitial_state: pieces [begin, end) of sequences x channel_blocks.
  void (*initial_state_gradient)(const BackwardParams& params, int64_t begin, int64_t end, void* scratch);
  // Pieces [begin, end) of batch x channel_blocks.
  void (*step)(const StepParams& params, int64_t begin, int64_t end, void* scratch);
};

extern const Kernels kGenericKernels;
extern const Kernels kGenericF64Kernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;

}  // namespace inlay::conv
