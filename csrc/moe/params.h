// The MoE family's contract between bindings and kernels. The maths is in python/inlay/ops/moe.py.
//
// Experts work on "rows": the pairs of a token and one of its slots, sorted by expert and within one by token, so that
// an expert's rows are contiguous wherever something is stored for each row. Rows of no expert are in no list.
#pragma once

#include "common/indices.h"
#include "common/rows.h"

namespace inlay::moe {

constexpr int64_t kMaxRoutedExperts = 1024;  // that a router chooses among
constexpr int64_t kMaxSlots = 32;            // that a router chooses

// Mirrored by python/inlay/ops/_moe_checks.py, like Activation.
enum class Scoring : int32_t {
  softmax,
  sigmoid,
  softmax_of_chosen,  // logits choose, and the softmax is over those chosen
};

struct RouterInputs {
  int64_t tokens = 0;
  int64_t experts = 0;            // E
  int64_t slots = 0;              // K
  RowTensor logits;               // [T, E]
  const uint8_t* mask = nullptr;  // [T] bool, or absent: which tokens the means and counts are over
  Scoring scoring = Scoring::softmax;
  bool renormalize = false;
  double scaling = 1.0;
};

struct RouterForwardParams {
  RouterInputs inputs;
  VectorTensor bias;           // [E], added to the scores that choose; or absent
  IndexTensor forced;          // [T * K], or absent
  int64_t groups = 1;          // that the experts fall into
  int64_t chosen_groups = 1;   // whose experts may be chosen
  OutputTensor weights;        // [T, K]
  int64_t* indices = nullptr;  // [T, K]
  // Statistics; null data: none is wanted. "wide" is f32, or f64 where logits are.
  int64_t* counts = nullptr;        // [E]
  OutputTensor mean_probabilities;  // [E] wide
  OutputTensor logsumexp;           // [T] wide
  OutputTensor measures;            // [3, T] wide: entropy, margin, largest magnitude of a logit
  void* scratch = nullptr;          // scratch_bytes(), aligned to 256 bytes
};

struct RouterBackwardParams {
  RouterInputs inputs;
  const int64_t* indices = nullptr;  // [T, K]
  RowTensor dweights;                // [T, K], or absent
  VectorTensor dmean_probabilities;  // [E] wide, or absent
  VectorTensor dlogsumexp;           // [T] wide, or absent
  const int64_t* counts = nullptr;   // [E], with dmean_probabilities: their sum is K times the number of tokens
  OutputTensor dlogits;              // [T, E]
};

enum class Activation : int32_t { silu, gelu, gelu_tanh, relu, relu2, gpt_oss };

// What is between an expert's two projections: activation(gate) * up, or for gpt_oss
// gate * sigmoid(1.702 * gate) * (up + 1); gate at most `limit` and up within +-limit. Ungated: activation(gate).
struct Gating {
  Activation activation = Activation::silu;
  bool gated = true;
  bool interleaved = false;  // gate and up take turns, else all of gate come first
  double limit = 0.0;        // infinity: none
};

// The matrices of all experts, [E, rows, columns], each row dense.
struct ExpertMatrices {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t expert_stride = 0;
  int64_t row_stride = 0;
};

// What forward and backward are given. T is x's dtype; "wide" is f32, or f64 where T is.
struct ExpertInputs {
  int64_t tokens = 0;        // T
  int64_t slots = 0;         // K
  int64_t experts = 0;       // E
  int64_t hidden = 0;        // H
  int64_t intermediate = 0;  // I
  bool transposed = false;   // projections are stored [in, out], else [out, in]
  Gating gating;
  RowTensor x;                  // [T, H] T, evenly spaced rows
  ExpertMatrices gate_up_proj;  // [E, P, H] T, or transposed; P is pre_activations()
  ExpertMatrices down_proj;     // [E, H, I] T, or transposed
  ExpertMatrices gate_up_bias;  // [E, P] T or wide, one row each; or absent
  ExpertMatrices down_bias;     // [E, H] T or wide; or absent
  VectorTensor weights;         // [T * K] T or wide, or absent: ones
  RowTensor shared;             // [T, H] T, added to the result; or absent
  VectorTensor shared_gate;     // [T] T or wide, whose sigmoid shared is multiplied by; or absent

  INLAY_HOST_DEVICE int64_t pre_activations() const { return gating.gated ? 2 * intermediate : intermediate; }
  INLAY_HOST_DEVICE int64_t most_rows() const { return tokens * slots; }
};

// The rows. `slots[r]` is token * K + slot; expert e has rows ends[e - 1] (0 for the first) to ends[e].
struct Rows {
  int32_t* slots = nullptr;  // [T * K]; beyond the last end those of no expert
  int32_t* ends = nullptr;   // [E]
};

struct ExpertForwardParams {
  ExpertInputs inputs;
  bool sorted = false;      // K is 1, rows are tokens in their order, and `ends` says where each expert's rows end
  IndexTensor indices;      // [T * K], E for none; unless sorted
  IndexTensor ends;         // [E], if sorted
  Rows rows;                // written; of a forward without gradients only where the kernels need them
  bool keeps_rows = false;  // whether a backward will read them
  OutputTensor y;           // [T, H] T
  OutputTensor h;           // [T * K, P] T in the order of rows: before the activation; or not wanted
  void* scratch = nullptr;  // scratch_bytes(), aligned to 256 bytes
};

struct ExpertBackwardParams {
  ExpertInputs inputs;
  Rows rows;                   // read
  RowTensor dy;                // [T, H] T
  RowTensor h;                 // as of the forward, or absent: computed again
  OutputTensor dx;             // [T, H] T, or not wanted; likewise all that follow
  OutputTensor dweights;       // [T, K] as weights
  OutputTensor dgate_up_proj;  // as gate_up_proj, dense
  OutputTensor ddown_proj;     // as down_proj, dense
  OutputTensor dgate_up_bias;  // as gate_up_bias
  OutputTensor ddown_bias;     // as down_bias
  OutputTensor dshared;        // [T, H] T
  OutputTensor dshared_gate;   // [T] as shared_gate
  void* scratch = nullptr;     // scratch_bytes(), aligned to 256 bytes
};

// Defined once per library: in moe/cpu/launch.cpp and moe/cpu/router_launch.cpp. `stream` is null on the CPU.
void route(const RouterForwardParams& params, void* stream);
void route_backward(const RouterBackwardParams& params, void* stream);
void forward(const ExpertForwardParams& params, void* stream);
void backward(const ExpertBackwardParams& params, void* stream);
int64_t scratch_bytes(const RouterForwardParams& params);
int64_t scratch_bytes(const ExpertForwardParams& params);
int64_t scratch_bytes(const ExpertBackwardParams& params);

}  // namespace inlay::moe
