// The conv family's contract between bindings and kernels. The maths is in python/inlay/ops/conv.py.
#pragma once

#include "common/rows.h"
#include "conv/sequences.h"

namespace inlay::conv {

// Mirrored by the enum of python/inlay/ops/conv.py.
enum class Activation : int32_t { none, silu };

constexpr int64_t kMinWidth = 2;
constexpr int64_t kMaxWidth = 8;

// A tensor [batch, time, channels]; null data: absent.
template <class Data>
struct Signal {
  Data data = nullptr;
  int64_t batch_stride = 0;
  int64_t time_stride = 0;
  int64_t channel_stride = 0;

  INLAY_HOST_DEVICE int64_t offset(int64_t batch, int64_t t, int64_t channel) const {
    return batch * batch_stride + t * time_stride + channel * channel_stride;
  }
};
using SignalInput = Signal<const void*>;
using SignalOutput = Signal<void*>;

// A tensor [sequences, channels, columns] of consecutive inputs, the newest in the last column; null data: absent.
template <class Data>
struct State {
  Data data = nullptr;
  int64_t sequence_stride = 0;
  int64_t channel_stride = 0;
  int64_t column_stride = 0;

  INLAY_HOST_DEVICE int64_t offset(int64_t sequence, int64_t channel, int64_t column) const {
    return sequence * sequence_stride + channel * channel_stride + column * column_stride;
  }
};
using StateInput = State<const void*>;
using StateOutput = State<void*>;

// What forward and backward are given.
struct Convolution {
  int64_t batch = 0;
  int64_t time = 0;
  int64_t channels = 0;
  int64_t width = 0;  // of the kernel, kMinWidth to kMaxWidth
  Sequences sequences;
  DType dtype = DType::f32;  // of x, y, the states and their gradients
  Activation activation = Activation::none;
  bool rounds_preactivation = false;  // to `dtype`, before the activation
  bool time_contiguous = false;       // signals have a time stride of 1, else a channel stride of 1
  SignalInput x;
  VectorTensor weight;       // [channels, width]
  VectorTensor bias;         // [channels] or absent
  StateInput initial_state;  // width - 1 columns, or absent

  // Where the initial state holds a position before the sequence.
  INLAY_HOST_DEVICE int64_t state_column(const Sequence& sequence, int64_t position) const {
    return width - 1 - (sequence.begin - position);
  }
};

struct ForwardParams : Convolution {
  SignalOutput y;
  StateOutput final_state;  // width - 1 columns, or not wanted
};

struct BackwardParams : Convolution {
  SignalInput dy;
  StateInput dfinal_state;  // or absent
  SignalOutput dx;
  StateOutput dinitial_state;  // or not wanted
  OutputTensor dweight;        // [channels, width] or not wanted
  OutputTensor dbias;          // [channels] or not wanted
  // Sums over groups of tokens, [partial_rows][sums()][channels] f32 (f64 for f64 x): width rows of dweight, then one
  // of dbias, where wanted. Summed over the groups in a fixed order, so that every run gives the same bits.
  void* partials = nullptr;
  int64_t partial_rows = 0;

  INLAY_HOST_DEVICE int64_t sums() const { return (dweight.data ? width : 0) + (dbias.data ? 1 : 0); }
};

// A few tokens on top of a state that is updated in place.
struct StepParams {
  int64_t batch = 0;
  int64_t time = 0;
  int64_t channels = 0;
  int64_t width = 0;
  int64_t slots = 0;    // of the state
  int64_t columns = 0;  // of the state, width - 1 at least
  DType dtype = DType::f32;
  Activation activation = Activation::none;
  bool rounds_preactivation = false;
  SignalInput x;
  VectorTensor weight;
  VectorTensor bias;
  StateOutput state;
  IndexTensor slot_of_row;  // [batch]; absent: each row has the slot of its number
  SignalOutput y;

  // The slot of a batch row, or -1: an index outside of the state means a row of padding, which gives zeros.
  INLAY_HOST_DEVICE int64_t slot(int64_t row) const {
    const int64_t slot = slot_of_row.data ? slot_of_row[row] : row;
    return slot < slots ? slot : -1;
  }
};

// Defined once per library: in conv/cpu/launch.cpp and in conv/cuda/launch.cu.
void forward(const ForwardParams& params, void* stream);
void backward(const BackwardParams& params, void* stream);
void step(const StepParams& params, void* stream);
// How many groups of tokens `backward` sums apart; the binding allocates `partials` for as many.
int64_t partial_rows(const BackwardParams& params);

}  // namespace inlay::conv
