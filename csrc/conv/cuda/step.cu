// Single steps: one channel a thread, its newest inputs in registers, token by token, then the state.
#include "conv/cuda/step.cuh"

#include "conv/cuda/launch.h"

namespace inlay::conv::cuda {
namespace {

// Any strides, widths and numbers of columns, and slots that are numbered.
template <typename T>
__global__ void __launch_bounds__(kThreads) step_kernel(const __grid_constant__ StepParams p) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = thread / p.channels;
  const int64_t channel = thread - row * p.channels;
  wait_for_predecessor();
  release_successor();
  if (row >= p.batch) return;
  const int64_t slot = p.slot(row);
  T* const y = static_cast<T*>(p.y.data) + p.y.offset(row, 0, channel);
  if (slot < 0) {
    for (int64_t t = 0; t < p.time; ++t) y[t * p.y.time_stride] = from_float<T>(0.0f);
    return;
  }
  const T* const x = static_cast<const T*>(p.x.data) + p.x.offset(row, 0, channel);
  StepChannel<T> own(p, slot, channel);
  for (int64_t t = 0; t < p.time; ++t) {
    y[t * p.y.time_stride] = from_float<T>(own.next(p, to_float(x[t * p.x.time_stride])));
  }
  own.store_state(p, slot, row, channel);
}

// The state that Hugging Face keeps, four columns side by side: a channel's is one access, its neighbours' come with
// it. The rows of a batch share their channels' weights, so each thread takes a few.
constexpr int kColumns = 4;
constexpr int kRowsOfThread = 4;

template <typename T>
__global__ void __launch_bounds__(kThreads) vector_step_kernel(const __grid_constant__ StepParams p) {
  using Columns = Packed<T, kColumns>;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t first = thread / p.channels * kRowsOfThread;
  const int64_t channel = thread % p.channels;
  wait_for_predecessor();
  release_successor();
  if (first >= p.batch) return;
  const int skipped = kColumns - static_cast<int>(p.width);  // columns that no weight meets
  const auto row_of = [&](int i) { return first + i; };
  const auto slot_of = [&](int i) { return row_of(i) < p.batch ? p.slot(row_of(i)) : -1; };
  const auto state_of = [&](int64_t slot) { return static_cast<T*>(p.state.data) + p.state.offset(slot, channel, 0); };
  const auto x_of = [&](int i) { return static_cast<const T*>(p.x.data) + p.x.offset(row_of(i), 0, channel); };
  Columns columns[kRowsOfThread];
  float input[kRowsOfThread];
#pragma unroll
  for (int i = 0; i < kRowsOfThread; ++i) {  // all loads before the first use
    const int64_t slot = slot_of(i);
    if (slot < 0) continue;
    columns[i] = load<T, kColumns>(state_of(slot));
    input[i] = to_float(*x_of(i));
  }
  float weight[kColumns];
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    weight[k] = k < skipped ? 0.0f : load_one(p.weight.data, p.weight.dtype, channel * p.width + k - skipped);
  }
  const float bias = p.bias.data ? load_one(p.bias.data, p.bias.dtype, channel) : 0.0f;
#pragma unroll
  for (int i = 0; i < kRowsOfThread; ++i) {
    if (row_of(i) >= p.batch) continue;
    const int64_t slot = slot_of(i);
    T* const y = static_cast<T*>(p.y.data) + p.y.offset(row_of(i), 0, channel);
    float taps[kColumns];
    if (slot >= 0) unpack(columns[i], taps);
    for (int64_t t = 0; t < p.time; ++t) {
      if (slot < 0) {
        y[t * p.y.time_stride] = from_float<T>(0.0f);
        continue;
      }
      if (t > 0) input[i] = to_float(x_of(i)[t * p.x.time_stride]);
      float z[1] = {0.0f};
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        taps[k] = k + 1 < kColumns ? taps[k + 1 < kColumns ? k + 1 : k] : input[i];
        if (k >= skipped) z[0] = __fmaf_rn(weight[k], taps[k], z[0]);
      }
      z[0] = __fadd_rn(z[0], bias);
      activate<T>(p.activation, p.rounds_preactivation, z);
      y[t * p.y.time_stride] = from_float<T>(z[0]);
    }
    if (slot >= 0) store_global(state_of(slot), pack<T>(taps));
  }
}

bool has_vectors(const StepParams& p) {
  const int64_t bytes = kColumns * size_of(p.dtype);
  return p.columns == kColumns && p.width <= kColumns && p.state.column_stride == 1 &&
         p.state.channel_stride == kColumns && p.state.sequence_stride % kColumns == 0 &&
         reinterpret_cast<uintptr_t>(p.state.data) % bytes == 0;
}

template <typename T>
void steps(const StepParams& p, void* stream) {
  if (has_vectors(p)) {
    start_threads<vector_step_kernel<T>>(p, ceil_div(p.batch, kRowsOfThread) * p.channels, stream);
  } else {
    start_threads<step_kernel<T>>(p, p.batch * p.channels, stream);
  }
}

}  // namespace

void single_steps(const StepParams& params, void* stream) {
  switch (params.dtype) {
    case DType::bf16:
      return steps<__nv_bfloat16>(params, stream);
    case DType::f16:
      return steps<__half>(params, stream);
    default:
      return steps<float>(params, stream);
  }
}

}  // namespace inlay::conv::cuda
