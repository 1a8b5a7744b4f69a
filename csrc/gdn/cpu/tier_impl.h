// The table of one tier's kernels, over its vector type.
#pragma once

#include "gdn/cpu/backward_impl.h"
#include "gdn/cpu/forward_impl.h"
#include "gdn/cpu/gates_impl.h"
#include "gdn/cpu/recurrent_impl.h"

namespace inlay::gdn {
namespace {

// From so many tokens on, a sequence is worked on in chunks unless the mode says otherwise. Measured in AVX2: one token
// takes a quarter of the time as a recurrence, 4 to 8 tokens take as long either way, more are faster as a chunk.
constexpr int64_t kChunkedFrom = 9;

INLAY_INLINE bool is_recurrent(Mode mode, int64_t tokens) {
  return mode == Mode::recurrent || (mode == Mode::automatic && tokens < kChunkedFrom);
}

template <class Vec>
void forward(const ForwardParams& p, const Task& task, void* memory) {
  const Inputs& inputs = p.inputs;
  const Sequence sequence = inputs.sequences[task.sequence];
  if (is_recurrent(p.mode, sequence.end - sequence.begin)) {
    Recurrent<Vec>(inputs, memory).run(task, {inputs.initial_state, p.final_state, {}}, p.o);
    return;
  }
  ChunkForward<Vec> chunks(inputs, memory);
  load_state<Vec>(inputs.initial_state, task.sequence, task.head, task.column, task.width, inputs.value_dim,
                  inputs.key_dim, chunks.state());
  chunks.run(task, p.o, {});
  if (!p.final_state.data) return;
  store_state<Vec>(chunks.state(), inputs.key_dim, p.final_state, task.sequence, task.head, task.column, task.width,
                   inputs.value_dim);
}

template <class Vec>
void step(const StepParams& p, const Task& task, void* memory) {
  Recurrent<Vec>(p.inputs, memory).run(task, {p.state, p.state, p.states_out}, p.o);
}

template <class Vec>
StateLog<typename Vec::Scalar> state_log(const Inputs& inputs, const BackwardScratch& scratch, const Task& task) {
  using Scalar = typename Vec::Scalar;
  const int64_t stride = padded_stride<Scalar>(inputs.value_dim), size = inputs.key_dim * stride;
  const int64_t first = inputs.sequences.first_chunk(task.sequence, kChunk);
  Scalar* data = static_cast<Scalar*>(scratch.states) + (first * inputs.value_heads + task.head) * size + task.column;
  return {data, inputs.value_heads * size, stride};
}

template <class Vec>
void backward_states(const BackwardParams& p, const BackwardScratch& scratch, const Task& task, void* memory) {
  const Inputs& inputs = p.inputs;
  ChunkForward<Vec> chunks(inputs, memory);
  load_state<Vec>(inputs.initial_state, task.sequence, task.head, task.column, task.width, inputs.value_dim,
                  inputs.key_dim, chunks.state());
  chunks.run(task, {}, state_log<Vec>(inputs, scratch, task));
}

template <class Vec>
void backward(const BackwardParams& p, const BackwardScratch& scratch, const Task& task, void* memory) {
  ChunkBackward<Vec>(p, scratch, memory).run(task, state_log<Vec>(p.inputs, scratch, task));
}

template <class Vec>
int64_t memory_bytes(const Inputs& inputs, Work work) {
  const int64_t recurrent = Recurrent<Vec>::elements(inputs), chunks = ChunkForward<Vec>::elements(inputs);
  const int64_t elements = work == Work::recurrent  ? recurrent
                           : work == Work::backward ? ChunkBackward<Vec>::elements(inputs)
                           : recurrent > chunks     ? recurrent
                                                    : chunks;
  return elements * static_cast<int64_t>(sizeof(typename Vec::Scalar));
}

template <class Vec>
constexpr Kernels kernels_of() {
  return {forward<Vec>, step<Vec>,           backward_states<Vec>,   backward<Vec>,    sum_group<Vec>,
          gates<Vec>,   gates_backward<Vec>, sum_gate_partials<Vec>, memory_bytes<Vec>};
}

}  // namespace
}  // namespace inlay::gdn
