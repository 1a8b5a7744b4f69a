// The step of a whole layer on the CPU: one family's kernels after the other. What passes between them is in the cache,
// and a launch costs nothing here.
#include "gdn/layer.h"
#include "common/cpu/memory.h"
#include "norm/params.h"

namespace inlay::gdn {
namespace {

// A contiguous [rows, heads, width] as tokens of one batch row each.
TokenTensor tokens_of(const void* data, DType dtype, int64_t time, int64_t token_stride, int64_t head_stride) {
  return {data, dtype, time * token_stride, token_stride, head_stride};
}

// Tokens [B, T, H] as rows [B T, H], and tokens [B, T, H, D] as rows [B T H, D].
RowTensor rows_of(const TokenTensor& tokens, int64_t time) {
  return {tokens.data, tokens.dtype, {time, 1, tokens.token_stride, 0, tokens.batch_stride}};
}
RowTensor head_rows_of(const TokenTensor& tokens, int64_t time, int64_t heads) {
  return {tokens.data, tokens.dtype, {heads, time, tokens.head_stride, tokens.token_stride, tokens.batch_stride}};
}

}  // namespace

void layer_step(const LayerStepParams& p, void* stream) {
  const int64_t time = p.conv.time, rows = p.conv.batch * time, heads = p.value_heads, channels = p.conv.channels;
  const DType dtype = p.conv.dtype, wide = wide_dtype(dtype);
  const int64_t element = size_of(dtype);
  const auto convolved = cpu::make_memory(rows * channels * element);
  const auto g = cpu::make_memory(rows * heads * size_of(wide));
  const auto beta = cpu::make_memory(rows * heads * size_of(p.b.dtype));
  const auto o = cpu::make_memory(rows * heads * p.value_dim * element);

  conv::StepParams conv = p.conv;
  conv.y = {convolved.get(), time * channels, channels, 1};
  conv::step(conv, stream);

  GatesParams gate;
  gate.rows = rows;
  gate.heads = heads;
  gate.a = rows_of(p.a, time);
  gate.b = rows_of(p.b, time);
  gate.log_decay = p.log_decay;
  gate.dt_bias = p.dt_bias;
  gate.g = {g.get(), wide};
  gate.beta = {beta.get(), p.b.dtype};
  gate.beta_scale = p.beta_scale;
  gates(gate, stream);

  StepParams rule;
  Inputs& inputs = rule.inputs;
  inputs.sequences.count = inputs.batch = p.conv.batch;
  inputs.sequences.tokens = time;
  inputs.key_heads = p.key_heads;
  inputs.value_heads = heads;
  inputs.key_dim = p.key_dim;
  inputs.value_dim = p.value_dim;
  const auto part = [&](int64_t channel, int64_t width) {
    return tokens_of(static_cast<const char*>(convolved.get()) + channel * element, dtype, time, channels, width);
  };
  inputs.q = part(0, p.key_dim);
  inputs.k = part(p.key_heads * p.key_dim, p.key_dim);
  inputs.v = part(2 * p.key_heads * p.key_dim, p.value_dim);
  inputs.g = tokens_of(g.get(), wide, time, heads, 1);
  inputs.beta = tokens_of(beta.get(), p.b.dtype, time, heads, 1);
  inputs.scale = p.scale;
  inputs.l2norm_qk = true;
  rule.state = p.state;
  rule.states_out = p.states_out;
  rule.o = {o.get(), dtype};
  step(rule, stream);

  norm::ForwardParams norm;
  norm.rows = rows * heads;
  norm.width = p.value_dim;
  norm.x.data = o.get();
  norm.x.dtype = dtype;
  norm.x.layout.outer_stride = p.value_dim;
  norm.gate = head_rows_of(p.z, time, heads);
  norm.weight = p.norm_weight;
  norm.y = p.y;
  norm.eps = p.eps;
  norm.kind = norm::Kind::rms;
  norm.rounding = Rounding::stepwise;
  norm.activation = norm::Activation::silu;
  norm::forward(norm, stream);
}

}  // namespace inlay::gdn
