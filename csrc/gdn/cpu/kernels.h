// What the gdn kernels of one instruction set offer; launch.cpp chooses among these tables and deals out the work.
#pragma once

#include "gdn/params.h"

namespace inlay::gdn {

// One value head of one sequence, and the columns [column, column + width) of its state that are worked on: those are
// independent of the others. `column` is a multiple of kColumnMultiple.
struct Task {
  int64_t sequence = 0;
  int64_t head = 0;
  int64_t column = 0;
  int64_t width = 0;
};

constexpr int64_t kColumnMultiple = 16;

// The backward's scratch memory, in wide elements.
struct BackwardScratch {
  void* states = nullptr;  // the state before each chunk, [chunk][Hv] matrices [K][padded V]
  void* dq = nullptr;      // [B * T][Hv][K], of each value head; used where several of them share a key head
  void* dk = nullptr;
};

// What a kernel needs memory of its own for.
enum class Work { recurrent, forward, backward };

// `memory`: one thread's own, aligned to kLineBytes, of as many bytes as `memory_bytes` says for the kind of work.
struct Kernels {
  // Output and final state of the task, by chunks or token by token as p.mode says for the sequence's length.
  void (*forward)(const ForwardParams& p, const Task& task, void* memory);
  void (*step)(const StepParams& p, const Task& task, void* memory);
  // The state before each chunk.
  void (*backward_states)(const BackwardParams& p, const BackwardScratch& scratch, const Task& task, void* memory);
  // Every gradient of the task, which has all columns; dq and dk into the scratch memory where heads share them.
  void (*backward)(const BackwardParams& p, const BackwardScratch& scratch, const Task& task, void* memory);
  // dq and dk of tokens [begin, end) of all B * T from those of the value heads.
  void (*sum_group)(const BackwardParams& p, const BackwardScratch& scratch, int64_t begin, int64_t end, void* memory);
  void (*gates)(const GatesParams& p, int64_t begin, int64_t end);
  // Groups of rows [begin, end) of p.partial_rows, or rows [begin, end) where no sums are wanted.
  void (*gates_backward)(const GatesBackwardParams& p, int64_t begin, int64_t end);
  void (*sum_gate_partials)(const GatesBackwardParams& p);
  int64_t (*memory_bytes)(const Inputs& inputs, Work work);
};

extern const Kernels kGenericKernels;
extern const Kernels kGenericF64Kernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;

}  // namespace inlay::gdn
