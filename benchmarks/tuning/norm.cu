// Times the shapes that norm.py put into this build's shape tables; each prints one line.
//
// A CUDA graph of launches that rotate over buffers larger than L2, as in the benchmarks, with the largest copy's
// bandwidth as the ceiling.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cases.h"  // by norm.py: CASES, calls of forward_case and backward_case
#include "norm/cuda/backward.cuh"
#include "norm/cuda/forward.cuh"
#include "norm/cuda/sum_partials.cuh"

namespace inlay::norm::cuda {
namespace {

using T = __nv_bfloat16;

constexpr int64_t kBufferBytes = int64_t{1} << 31;
constexpr int kMaxSets = 8;
constexpr int kMinLaunches = 12;
constexpr int kReplays = 7;

void require(cudaError_t status) {
  if (status != cudaSuccess) {
    std::printf("%s\n", cudaGetErrorString(status));
    std::exit(1);
  }
}

// Values between -1.7 and 1.7 that do not repeat: power and so speed depend on the data.
__global__ void fill(T* data, int64_t count, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    uint32_t hash = static_cast<uint32_t>(i) * 2654435761u + seed;
    hash = (hash ^ (hash >> 15)) * 0x85ebca6b;
    hash = (hash ^ (hash >> 13)) * 0xc2b2ae35;
    data[i] = __float2bfloat16(((hash >> 16) / 32768.0f - 1.0f) * 1.7f);
  }
}

struct Buffers {
  char* rows[5];  // x, the second and third input, two outputs
  T* vector;
  T* dvector;
  float* rstd;
  float* partials;
  double ceiling;  // bytes a second
};

double seconds_of(cudaStream_t stream, cudaGraphExec_t graph) {
  cudaEvent_t begin, end;
  require(cudaEventCreate(&begin));
  require(cudaEventCreate(&end));
  require(cudaEventRecord(begin, stream));
  require(cudaGraphLaunch(graph, stream));
  require(cudaEventRecord(end, stream));
  require(cudaEventSynchronize(end));
  float milliseconds = 0;
  require(cudaEventElapsedTime(&milliseconds, begin, end));
  return milliseconds * 1e-3;
}

// Median seconds of one of `launch(set, stream)`.
template <class Body>
double time(int sets, Body launch) {
  cudaStream_t stream;
  require(cudaStreamCreate(&stream));
  const int launches = std::max(sets, kMinLaunches);
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < launches; ++i) launch(i % sets, stream);
  require(cudaStreamEndCapture(stream, &graph));
  require(cudaGraphInstantiate(&executable, graph, 0));
  seconds_of(stream, executable);
  std::vector<double> samples;
  for (int i = 0; i < kReplays; ++i) samples.push_back(seconds_of(stream, executable) / launches);
  std::sort(samples.begin(), samples.end());
  return samples[kReplays / 2];
}

RowTensor rows_at(const Buffers& buffers, int index, int set, int64_t bytes, int64_t width) {
  RowTensor rows{buffers.rows[index] + set * bytes, DType::bf16, {}};
  rows.layout.outer_stride = width;
  return rows;
}

OutputTensor output_at(const Buffers& buffers, int index, int set, int64_t bytes) {
  return {buffers.rows[index] + set * bytes, DType::bf16};
}

template <auto Kernel>
void report(const Buffers& buffers, const char* what, int64_t rows, int64_t width, const Shape& shape, int64_t moved,
            double seconds) {
  cudaFuncAttributes attributes;
  require(cudaFuncGetAttributes(&attributes, Kernel));
  std::printf("%s %ldx%ld group %d vectors %d threads %d blocks %d: %d registers, %d spilled, %.2f us, %.3f of copy\n",
              what, static_cast<long>(rows), static_cast<long>(width), shape.group, shape.vectors, shape.threads,
              shape.blocks, attributes.numRegs, static_cast<int>(attributes.localSizeBytes), seconds * 1e6,
              moved / seconds / buffers.ceiling);
}

template <Role kRole, int kIndex>
void forward_case(const Buffers& buffers, const char* what, int64_t rows, int64_t width, Rounding rounding) {
  constexpr Shape kShape = forward_shapes<kRole>()[kIndex];
  constexpr auto kKernel = forward_kernel<T, kRole, kIndex>;
  const int64_t bytes = rows * width * sizeof(T);
  const int64_t blocks = (rows + kShape.groups() - 1) / kShape.groups();
  Launch<ForwardParams> launch{};
  if constexpr (kRole == Role::gated) {
    launch = resident_launch<kKernel, kShape.threads, sizeof(ForwardBuffer<kRole, kIndex>), ForwardParams>(blocks);
  } else {
    launch = block_per_piece_launch<kKernel, kShape.threads, ForwardParams>(blocks);
  }
  ForwardParams p;
  p.rows = rows;
  p.width = width;
  p.weight = {buffers.vector, DType::bf16};
  p.eps = 1e-6;
  p.rounding = rounding;
  p.weight_offset = rounding == Rounding::once ? 1.0 : 0.0;
  const double seconds = time(std::min<int64_t>(kMaxSets, kBufferBytes / bytes), [&](int set, cudaStream_t stream) {
    p.x = rows_at(buffers, 0, set, bytes, width);
    if (kRole == Role::residual) {
      p.residual = rows_at(buffers, 1, set, bytes, width);
      p.residual_out = output_at(buffers, 4, set, bytes);
    }
    if (kRole == Role::gated) p.gate = rows_at(buffers, 1, set, bytes, width);
    p.y = output_at(buffers, 3, set, bytes);
    launch.start(p, launch.blocks, stream);
  });
  constexpr int kTensors = kRole == Role::plain ? 2 : kRole == Role::residual ? 4 : 3;
  report<kKernel>(buffers, what, rows, width, kShape, kTensors * bytes, seconds);
}

template <Role kRole, int kIndex>
void backward_case(const Buffers& buffers, const char* what, int64_t rows, int64_t width) {
  constexpr Shape kShape = kBackwardShapes[kIndex];
  constexpr auto kKernel = backward_kernel<T, kRole, false, kIndex>;
  const int64_t bytes = rows * width * sizeof(T);
  const auto launch = resident_launch<kKernel, kShape.threads, sizeof(BackwardBuffer<kRole, kIndex>), BackwardParams>(
      (rows + kShape.groups() - 1) / kShape.groups());
  BackwardParams p;
  p.rows = rows;
  p.width = width;
  p.weight = {buffers.vector, DType::bf16};
  p.weight_offset = 1.0;
  p.rstd = buffers.rstd;
  p.partials = buffers.partials;
  p.partial_rows = launch.blocks;
  p.dweight = {buffers.dvector, DType::bf16};
  const double seconds = time(std::min<int64_t>(kMaxSets, kBufferBytes / bytes), [&](int set, cudaStream_t stream) {
    p.x = rows_at(buffers, 0, set, bytes, width);
    p.dy = rows_at(buffers, 1, set, bytes, width);
    if (kRole == Role::residual) p.dresidual_out = rows_at(buffers, 2, set, bytes, width);
    if (kRole == Role::gated) {
      p.gate = rows_at(buffers, 2, set, bytes, width);
      p.dgate = output_at(buffers, 4, set, bytes);
    }
    p.dx = output_at(buffers, 3, set, bytes);
    launch.start(p, launch.blocks, stream);
    start<sum_partials_kernel, kSumThreads>(p, dim3((width + kSumColumns - 1) / kSumColumns, 1), stream);
  });
  constexpr int kTensors = kRole == Role::plain ? 3 : kRole == Role::residual ? 4 : 5;
  report<kKernel>(buffers, what, rows, width, kShape, kTensors * bytes, seconds);
}

Buffers make_buffers() {
  constexpr int64_t kRows = int64_t{1} << 20;
  constexpr int64_t kWidth = int64_t{1} << 16;
  Buffers buffers{};
  for (char*& rows : buffers.rows) require(cudaMalloc(&rows, kBufferBytes));
  for (int i = 0; i < 3; ++i) {
    fill<<<1024, 256>>>(reinterpret_cast<T*>(buffers.rows[i]), kBufferBytes / sizeof(T), i + 1);
  }
  require(cudaMalloc(&buffers.vector, kWidth * sizeof(T)));
  require(cudaMalloc(&buffers.dvector, kWidth * sizeof(T)));
  require(cudaMalloc(&buffers.rstd, kRows * sizeof(float)));
  require(cudaMalloc(&buffers.partials, 2048 * kWidth * sizeof(float)));
  fill<<<64, 256>>>(buffers.vector, kWidth, 9);
  const std::vector<float> rstd(kRows, 0.9f);
  require(cudaMemcpy(buffers.rstd, rstd.data(), kRows * sizeof(float), cudaMemcpyHostToDevice));
  const double seconds = time(1, [&](int, cudaStream_t stream) {
    require(cudaMemcpyAsync(buffers.rows[3], buffers.rows[0], kBufferBytes, cudaMemcpyDeviceToDevice, stream));
  });
  buffers.ceiling = 2 * kBufferBytes / seconds;
  return buffers;
}

}  // namespace
}  // namespace inlay::norm::cuda

int main() {
  using namespace inlay::norm;
  using namespace inlay::norm::cuda;
  const Buffers buffers = make_buffers();
  CASES
}
