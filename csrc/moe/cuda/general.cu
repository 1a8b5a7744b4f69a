// The steps of general.h as products, for each dtype.
#include "moe/cuda/general_outer.cuh"

namespace inlay::moe::cuda {
namespace {

void start(const Products& p, DType dtype, void* stream) {
  if (dtype == DType::f32) {
    start_products<float>(p, stream);
  } else if (dtype == DType::bf16) {
    start_products<__nv_bfloat16>(p, stream);
  } else {
    start_products<__half>(p, stream);
  }
}

void start(const OuterProducts& p, DType dtype, void* stream) {
  if (dtype == DType::f32) {
    start_outer<float>(p, stream);
  } else if (dtype == DType::bf16) {
    start_outer<__nv_bfloat16>(p, stream);
  } else {
    start_outer<__half>(p, stream);
  }
}

RowMatrix by_token(const RowTensor& tensor) { return {tensor.data, tensor.layout.outer_stride, true}; }
RowMatrix by_row(const void* data, int64_t width) { return {data, width, false}; }

template <typename Steps>
Products products_of(const Steps& steps, Finish finish) {
  Products p;
  p.finish = finish;
  p.padded = steps.padded;
  p.rows = steps.rows;
  p.gating = steps.inputs.gating;
  p.intermediate = static_cast<int>(steps.inputs.intermediate);
  p.weights = steps.inputs.weights;
  return p;
}

// The gradients of matrices whose inputs and outputs are these.
void start_gradients(const BackwardSteps& steps, const OutputTensor& gradients, const RowMatrix& outputs,
                     int64_t output_width, const RowMatrix& inputs, int64_t input_width, void* stream) {
  if (!gradients.data) return;
  const bool transposed = steps.inputs.transposed;
  OuterProducts p;
  p.padded = steps.padded;
  p.rows = steps.rows;
  p.left = transposed ? inputs : outputs;
  p.right = transposed ? outputs : inputs;
  p.height = static_cast<int>(transposed ? input_width : output_width);
  p.width = static_cast<int>(transposed ? output_width : input_width);
  p.experts = steps.inputs.experts;
  p.results = gradients.data;
  start(p, gradients.dtype, stream);
}

}  // namespace

int64_t general_part_width() { return kTileColumns; }

void general_forward_products(const ForwardSteps& steps, void* stream) {
  const ExpertInputs& in = steps.inputs;
  if (steps.h || steps.a) {
    Products p = products_of(steps, Finish::activate);
    p.left = by_token(in.x);
    p.depth = static_cast<int>(in.hidden);
    p.matrices = in.gate_up_proj;
    p.depth_is_rows = in.transposed;
    p.columns = static_cast<int>(in.pre_activations());
    p.bias = in.gate_up_bias;
    p.h = steps.h;
    p.a = steps.a;
    start(p, in.x.dtype, stream);
  }
  if (!steps.results) return;
  Products p = products_of(steps, Finish::plain);
  p.left = by_row(steps.a, in.intermediate);
  p.depth = static_cast<int>(in.intermediate);
  p.matrices = in.down_proj;
  p.depth_is_rows = in.transposed;
  p.columns = static_cast<int>(in.hidden);
  p.bias = in.down_bias;
  p.results = steps.results;
  start(p, in.x.dtype, stream);
}

void general_backward_products(const BackwardSteps& steps, void* stream) {
  const ExpertInputs& in = steps.inputs;
  if (steps.a || steps.dh || steps.weight_parts) {
    Products p = products_of(steps, Finish::gradient);
    p.left = by_token(steps.dy);
    p.depth = static_cast<int>(in.hidden);
    p.matrices = in.down_proj;
    p.depth_is_rows = !in.transposed;
    p.columns = static_cast<int>(in.intermediate);
    p.h = const_cast<void*>(steps.h);
    p.a = steps.a;
    p.dh = steps.dh;
    p.weight_parts = steps.weight_parts;
    start(p, in.x.dtype, stream);
  }
  if (steps.dx) {
    Products p = products_of(steps, Finish::plain);
    p.left = by_row(steps.dh, in.pre_activations());
    p.depth = static_cast<int>(in.pre_activations());
    p.matrices = in.gate_up_proj;
    p.depth_is_rows = !in.transposed;
    p.columns = static_cast<int>(in.hidden);
    p.results = steps.dx;
    start(p, in.x.dtype, stream);
  }
  start_gradients(steps, steps.dgate_up_proj, by_row(steps.dh, in.pre_activations()), in.pre_activations(),
                  by_token(in.x), in.hidden, stream);
  start_gradients(steps, steps.ddown_proj, by_token(steps.dy), in.hidden, by_row(steps.a, in.intermediate),
                  in.intermediate, stream);
}

}  // namespace inlay::moe::cuda
