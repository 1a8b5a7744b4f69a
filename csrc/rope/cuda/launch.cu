// The CUDA side of rope/params.h: chooses a kernel and starts it.
#include "rope/cuda/launch.h"

#include "common/cuda/vector.cuh"
#include "rope/cuda/sum_partials.cuh"

namespace inlay::rope {
namespace cuda {
namespace {

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Every head, and every row of a table, starts at a multiple of 16 bytes.
bool aligned(const TokenTensor& tensor) {
  const int64_t elements = 16 / size_of(tensor.dtype);
  return aligned(tensor.data) && tensor.batch_stride % elements == 0 && tensor.token_stride % elements == 0 &&
         tensor.head_stride % elements == 0;
}
bool aligned(const Table& table, DType dtype) {
  const int64_t elements = 16 / size_of(dtype);
  return aligned(table.data) && table.batch_stride % elements == 0 && table.token_stride % elements == 0;
}

// Whether threads can hold heads as Share says: in pairs of vectors, each rotated as a whole or not at all. Pieces of
// work are numbered in 32 bits, with some room for a grid's last step.
bool fits_registers(const Problem& p, int64_t heads) {
  const int64_t elements = 16 / size_of(p.dtype);
  const bool whole = p.width % (2 * elements) == 0 && p.rotary % (p.interleaved ? elements : 2 * elements) == 0;
  const bool countable = p.batch * p.tokens <= INT32_MAX / 2 / (heads > 0 ? heads : 1);
  return whole && countable && aligned(p.cos, p.angles) && aligned(p.sin, p.angles);
}

template <int Count>
int shape_for(const Shape (&shapes)[Count], const Problem& p) {
  return shape_index(shapes, p.width / (16 / size_of(p.dtype)));
}

void require_supported(DType dtype) {
  if (dtype == DType::f64) inlay::cuda::fail("inlay: q must be float32, bfloat16 or float16 on CUDA, got float64");
}

// Calls `use` with a value of the dtype's element type.
template <class Use>
auto with_type(DType dtype, Use use) {
  switch (dtype) {
    case DType::bf16:
      return use(__nv_bfloat16{});
    case DType::f16:
      return use(__half{});
    default:
      return use(float{});
  }
}

Launch<ForwardParams> find_forward(const ForwardParams& p) {
  const auto fits = [](const ForwardSide& side) { return aligned(side.x) && aligned(side.weight.data); };
  const int shape = shape_for(kForwardShapes, p);
  if (shape < 0 || !fits_registers(p, p.q.heads + p.k.heads) || !fits(p.q) || !fits(p.k)) return general_forward(p);
  // The sides differ where one weight alone is wider than its side: one is to be rounded where the other is not.
  if (p.q.rounds_products != p.k.rounds_products) return general_forward(p);
  return with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) < sizeof(float)) {
      const bool own_weights = p.q.weight.dtype == p.dtype && p.k.weight.dtype == p.dtype;
      const bool stepwise = p.q.rounds_normalised && own_weights && p.weight_offset == 0.0;
      if (p.q.rounds_products) {
        return p.normalises && stepwise ? register_forward<T, Form::stepwise>(p, shape)
                                        : register_forward<T, Form::packed>(p, shape);
      }
    }
    return register_forward<T, Form::wide>(p, shape);
  });
}

BackwardLaunch find_backward(const BackwardParams& p) {
  const auto fits = [&](const BackwardSide& side) {
    return aligned(side.dy) && (!p.normalises || aligned(side.x)) && aligned(side.weight.data);
  };
  const int shape = shape_for(kBackwardShapes, p);
  if (shape < 0 || !fits_registers(p, p.q.heads + p.k.heads) || !fits(p.q) || !fits(p.k)) return general_backward(p);
  return with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) < sizeof(float)) {
      if (p.angles == DType::f32) return register_backward<T, float>(p, shape);
    }
    return register_backward<T, T>(p, shape);
  });
}

}  // namespace
}  // namespace cuda

void forward(const ForwardParams& params, void* stream) {
  cuda::require_supported(params.dtype);
  const auto launch = cuda::find_forward(params);
  launch.start(params, launch.blocks, stream);
}

PartialRows partial_rows(const BackwardParams& params) {
  cuda::require_supported(params.dtype);
  const auto found = cuda::find_backward(params);
  return {found.q_blocks, found.launch.blocks - found.q_blocks};
}

void backward(const BackwardParams& params, void* stream) {
  cuda::require_supported(params.dtype);
  const auto launch = cuda::find_backward(params).launch;
  launch.start(params, launch.blocks, stream);
  if (!params.q.partials && !params.k.partials) return;
  const dim3 grid(static_cast<unsigned>((params.width + cuda::kSumColumns - 1) / cuda::kSumColumns), 2);
  inlay::cuda::start<cuda::sum_partials_kernel, cuda::kSumThreads>(params, grid, stream);
}

}  // namespace inlay::rope
