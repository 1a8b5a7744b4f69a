// A whole Gated DeltaNet layer between its projections, for a few tokens: what its binding and its kernels share.
#pragma once

#include "conv/params.h"
#include "gdn/params.h"

namespace inlay::gdn {

struct LayerStepParams {
  conv::StepParams conv;  // of mixed_qkv [B, T, 2 Hk K + Hv V], whose dtype is T; without y, which is not kept
  int64_t key_heads = 0;
  int64_t value_heads = 0;
  int64_t key_dim = 0;
  int64_t value_dim = 0;
  TokenTensor a;             // [B, T, Hv], dense in its last dimension
  TokenTensor b;             // the same; T or wide
  VectorTensor log_decay;    // A_log, [Hv]
  VectorTensor dt_bias;      // [Hv]
  TokenTensor z;             // [B, T, Hv, V] T
  VectorTensor norm_weight;  // [V]
  StateTensor state;         // [B, Hv, K, V] wide or bf16, updated in place
  OutputTensor y;            // [B, T, Hv, V] T
  double scale = 1.0;        // of q
  double eps = 0.0;
  double beta_scale = 1.0;
  OutputTensor states_out;  // [B, T, Hv, K, V] in state's dtype, the state after each token; or not wanted

  INLAY_HOST_DEVICE int64_t group() const { return value_heads / key_heads; }
};

// Defined once per library, as those of params.h. There is at least one token of one sequence.
void layer_step(const LayerStepParams& params, void* stream);

}  // namespace inlay::gdn
