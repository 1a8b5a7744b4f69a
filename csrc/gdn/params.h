// The gdn family's contract between bindings and kernels. The maths is in python/inlay/ops/gdn/__init__.py.
#pragma once

#include "common/rows.h"
#include "common/sequences.h"

namespace inlay::gdn {

constexpr int64_t kChunk = 64;        // tokens that are worked on as matrices
constexpr int64_t kMaxHeadDim = 256;  // of K and of V, which are multiples of kHeadDimMultiple
constexpr int64_t kHeadDimMultiple = 8;
constexpr int64_t kMaxStepTokens = 16;
constexpr double kL2Eps = 1e-6;  // added to the sum of squares of a row of q or k, as Hugging Face does

// Mirrored by python/inlay/ops/gdn/rule.py.
enum class Mode : int32_t { automatic, chunk, recurrent };

// States [N, Hv, K, V], each [K, V] of them dense; null data: absent (as input: zeros, as output: not wanted).
struct StateTensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t sequence_stride = 0;
  int64_t head_stride = 0;

  INLAY_HOST_DEVICE int64_t offset(int64_t sequence, int64_t head) const {
    return sequence * sequence_stride + head * head_stride;
  }
};

// What the forward and the backward of the rule are given. T is q's dtype; "wide" is f32, or f64 where T is f64.
struct Inputs {
  Sequences sequences;
  int64_t batch = 0;
  int64_t key_heads = 0;      // Hk
  int64_t value_heads = 0;    // Hv, a multiple of Hk
  int64_t key_dim = 0;        // K
  int64_t value_dim = 0;      // V
  TokenTensor q;              // [B, T, Hk, K] T
  TokenTensor k;              // [B, T, Hk, K] T
  TokenTensor v;              // [B, T, Hv, V] T
  TokenTensor g;              // [B, T, Hv] wide
  TokenTensor beta;           // [B, T, Hv] T or wide
  StateTensor initial_state;  // T's states: wide or bf16
  double scale = 1.0;
  bool l2norm_qk = false;

  INLAY_HOST_DEVICE int64_t group() const { return value_heads / key_heads; }
};

struct ForwardParams {
  Inputs inputs;
  OutputTensor o;           // [B, T, Hv, V] T
  StateTensor final_state;  // wide or bf16, or not wanted
  Mode mode = Mode::automatic;
  void* scratch = nullptr;  // scratch_elements() wide elements
};

// The rule token by token on states that are updated in place: initial_state is `state`, and so is final_state.
struct StepParams {
  Inputs inputs;
  OutputTensor o;           // [B, T, Hv, V] T
  StateTensor state;        // [B, Hv, K, V]
  OutputTensor states_out;  // [B, T, Hv, K, V] in state's dtype, or not wanted
};

struct BackwardParams {
  Inputs inputs;
  TokenTensor dout;            // [B, T, Hv, V] T or wide
  StateTensor dfinal_state;    // wide or bf16, or absent: zeros
  OutputTensor dq;             // [B, T, Hk, K] T
  OutputTensor dk;             // [B, T, Hk, K] T
  OutputTensor dv;             // [B, T, Hv, V] T
  OutputTensor dg;             // [B, T, Hv] wide
  OutputTensor dbeta;          // [B, T, Hv] T or wide, as beta
  StateTensor dinitial_state;  // wide or bf16, or not wanted
  void* scratch = nullptr;     // scratch_elements() wide elements
};

struct GatesParams {
  int64_t rows = 0;
  int64_t heads = 0;
  RowTensor a;  // [rows, heads]
  RowTensor b;
  VectorTensor log_decay;  // A_log, [heads]
  VectorTensor dt_bias;    // [heads]
  OutputTensor g;          // [rows, heads] wide
  OutputTensor beta;       // [rows, heads]
  double beta_scale = 1.0;
};

struct GatesBackwardParams {
  int64_t rows = 0;
  int64_t heads = 0;
  RowTensor dg;     // [rows, heads] wide
  RowTensor dbeta;  // [rows, heads]
  RowTensor a;
  RowTensor b;
  VectorTensor log_decay;
  VectorTensor dt_bias;
  OutputTensor da;
  OutputTensor db;
  OutputTensor dlog_decay;  // [heads] or not wanted
  OutputTensor ddt_bias;    // [heads] or not wanted
  // Sums over groups of rows, [partial_rows][dlog_decay, ddt_bias][heads] wide; null: neither is wanted. Added up in a
  // fixed order, so that every run gives the same bits.
  void* partials = nullptr;
  int64_t partial_rows = 0;
  double beta_scale = 1.0;
};

// Defined once per library: in gdn/cpu/launch.cpp, and for CUDA where its kernels are. `stream` is null on the CPU.
void forward(const ForwardParams& params, void* stream);
void step(const StepParams& params, void* stream);
void backward(const BackwardParams& params, void* stream);
// How many wide elements of scratch memory each takes.
int64_t scratch_elements(const ForwardParams& params);
int64_t scratch_elements(const BackwardParams& params);
void gates(const GatesParams& params, void* stream);
void gates_backward(const GatesBackwardParams& params, void* stream);
// How many groups of rows `gates_backward` sums apart.
int64_t partial_rows(const GatesBackwardParams& params);

}  // namespace inlay::gdn
