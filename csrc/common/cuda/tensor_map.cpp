#include "common/cuda/tensor_map.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common/cuda/runtime.h"

namespace inlay::cuda {

// The driver's function is looked up, so that the library does not need to be linked with the driver's.
CUtensorMap make_tensor_map(const BoxedTensor& of) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "looking up cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) fail("inlay: the driver has no tensor maps");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  const TokenTensor& x = of.tensor;
  // The engine wants no empty dimension, and a proper stride where it says nothing.
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n > 0 ? n : 1); };
  const auto bytes = [](int64_t n, int64_t stride) { return static_cast<cuuint64_t>(n > 1 ? stride * 2 : 16); };
  const cuuint64_t sizes[] = {size(of.columns), size(of.tokens), size(of.heads), size(of.batch)};
  const cuuint64_t strides[] = {bytes(of.tokens, x.token_stride), bytes(of.heads, x.head_stride),
                                bytes(of.batch, x.batch_stride)};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(of.rows), 1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  CUtensorMap map;
  const auto make = [&] {
    return encode(&map, x.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
                  const_cast<void*>(x.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = make();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {  // a thread of autograd's that has not used the GPU yet
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
    result = make();
  }
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("inlay: cuTensorMapEncodeTiled failed with error " + std::to_string(result));
  }
  return map;
}

}  // namespace inlay::cuda
