// The CUDA side of norm/params.h: chooses a kernel and starts it.
#include <initializer_list>
#include <type_traits>

#include "norm/cuda/config.h"
#include "norm/cuda/launch.h"
#include "norm/cuda/sum_partials.cuh"

namespace inlay::norm {
namespace cuda {
namespace {

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Every row starts at a multiple of 16 bytes.
bool aligned_rows(const RowTensor& tensor) {
  const int64_t elements = 16 / size_of(tensor.dtype);
  const RowLayout& layout = tensor.layout;
  return aligned(tensor.data) && layout.inner_stride % elements == 0 && layout.middle_stride % elements == 0 &&
         layout.outer_stride % elements == 0;
}

// Whether all tensors allow 16-byte accesses of `elements` each.
bool wide_accesses(int64_t width, int64_t elements, std::initializer_list<RowTensor> rows,
                   std::initializer_list<const void*> dense) {
  if (width % elements != 0) return false;
  for (const RowTensor& tensor : rows) {
    if (!aligned_rows(tensor)) return false;
  }
  for (const void* data : dense) {
    if (!aligned(data)) return false;
  }
  return true;
}

// A register kernel takes its tensors in one dtype.
bool is(DType dtype, std::initializer_list<RowTensor> tensors) {
  for (const RowTensor& tensor : tensors) {
    if (tensor.data && tensor.dtype != dtype) return false;
  }
  return true;
}

bool own_or_f32(const VectorTensor& vector, DType dtype) {
  return !vector.data || vector.dtype == dtype || vector.dtype == DType::f32;
}

Role role_of(const void* residual, const void* gate) {
  return residual ? Role::residual : gate ? Role::gated : Role::plain;
}

// Calls `use` with a value of the dtype's element type, and the role as a type.
template <class Use>
auto with_type_and_role(DType dtype, Role role, Use use) {
  const auto with_role = [&](auto zero) {
    switch (role) {
      case Role::residual:
        return use(zero, std::integral_constant<Role, Role::residual>{});
      case Role::gated:
        return use(zero, std::integral_constant<Role, Role::gated>{});
      default:
        return use(zero, std::integral_constant<Role, Role::plain>{});
    }
  };
  switch (dtype) {
    case DType::bf16:
      return with_role(__nv_bfloat16{});
    case DType::f16:
      return with_role(__half{});
    default:
      return with_role(float{});
  }
}

void require_supported(DType dtype) {
  if (dtype == DType::f64) inlay::cuda::fail("inlay: x must be float32, bfloat16 or float16 on CUDA, got float64");
}

Launch<ForwardParams> find_forward(const ForwardParams& p) {
  const int64_t elements = 16 / size_of(p.x.dtype);
  const auto wide = [&](int64_t lanes) {
    return wide_accesses(p.width, lanes, {p.x, p.residual, p.gate},
                         {p.weight.data, p.bias.data, p.y.data, p.residual_out.data});
  };
  const bool one_dtype = is(p.x.dtype, {p.residual, p.gate}) && (!p.residual.data || p.residual_out.dtype == p.x.dtype);
  const bool vectors_fit = own_or_f32(p.weight, p.x.dtype) && own_or_f32(p.bias, p.x.dtype) &&
                           (!p.weight.data || !p.bias.data || p.weight.dtype == p.bias.dtype);
  if (one_dtype && vectors_fit && wide(elements)) {
    const Role role = role_of(p.residual.data, p.gate.data);
    return with_type_and_role(p.x.dtype, role, [&](auto zero, auto constant) {
      constexpr Role kRole = decltype(constant)::value;
      const int shape = forward_shape<kRole>(p.width / elements, p.rows, inlay::cuda::multiprocessor_count());
      return shape < 0 ? general_forward(p, wide(8)) : register_forward<decltype(zero), kRole>(p, shape);
    });
  }
  return general_forward(p, wide(8));
}

Launch<BackwardParams> find_backward(const BackwardParams& p) {
  const DType dtype = p.dx.dtype;
  const int64_t elements = 16 / size_of(dtype);
  const auto wide = [&](int64_t lanes) {
    return wide_accesses(p.width, lanes, {p.x, p.dy, p.dresidual_out, p.gate},
                         {p.weight.data, p.bias.data, p.dx.data, p.dgate.data, p.dresidual.data, p.partials});
  };
  const Role role = role_of(p.dresidual_out.data, p.gate.data);
  const bool bias_in_place = !p.dbias.data || role == Role::plain;
  if (is(dtype, {p.x, p.dy, p.dresidual_out, p.gate}) && own_or_f32(p.weight, dtype) && !p.dresidual.data &&
      bias_in_place && wide(elements)) {
    const int shape = shape_index(kBackwardShapes, p.width / elements);
    if (shape >= 0) {
      return with_type_and_role(dtype, role, [&](auto zero, auto constant) {
        return register_backward<decltype(zero), decltype(constant)::value>(p, shape);
      });
    }
  }
  return general_backward(p, wide(8));
}

}  // namespace
}  // namespace cuda

void forward(const ForwardParams& params, void* stream) {
  cuda::require_supported(params.x.dtype);
  const auto launch = cuda::find_forward(params);
  launch.start(params, launch.blocks, stream);
}

int64_t partial_rows(const BackwardParams& params) {
  cuda::require_supported(params.x.dtype);
  return cuda::find_backward(params).blocks;
}

void backward(const BackwardParams& params, void* stream) {
  cuda::require_supported(params.x.dtype);
  const auto launch = cuda::find_backward(params);
  launch.start(params, launch.blocks, stream);
  if (!params.partials) return;
  const unsigned wanted = (params.dweight.data != nullptr) + (params.dbias.data != nullptr);
  const dim3 grid(static_cast<unsigned>((params.width + cuda::kSumColumns - 1) / cuda::kSumColumns), wanted);
  inlay::cuda::start<cuda::sum_partials_kernel, cuda::kSumThreads>(params, grid, stream);
}

}  // namespace inlay::norm
