// The gates of the gated delta rule on CUDA, and their gradients:
//
//   g = -exp(A_log) softplus(a + dt_bias)       beta = beta_scale sigmoid(b)
//
// A block is 32 heads wide and eight rows high. The gradients of A_log and dt_bias are sums over all rows: each thread
// adds its rows, each block its threads, a second kernel the blocks, all in a fixed order.
#include <algorithm>

#include "common/cuda/launch.cuh"
#include "gdn/cuda/gates.cuh"

namespace inlay::gdn {
namespace cuda {
namespace {

constexpr int kLanes = 32;  // heads
constexpr int kRows = 8;
constexpr int kThreads = kLanes * kRows;
constexpr int64_t kBlocks = 264;  // over the rows, at most: how many partial sums there are

__device__ void write(const OutputTensor& tensor, int64_t index, float x) {
  const float values[1] = {x};
  store_from_float(tensor.data, tensor.dtype, index, values);
}

__global__ void __launch_bounds__(kThreads) gates_kernel(const __grid_constant__ GatesParams p) {
  wait_for_predecessor();
  release_successor();
  const int64_t head = static_cast<int64_t>(blockIdx.y) * kLanes + threadIdx.x % kLanes;
  if (head >= p.heads) return;
  const float rate = -expf(value(p.log_decay, head));
  const float bias = value(p.dt_bias, head);
  const float beta_scale = static_cast<float>(p.beta_scale);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kLanes; row < p.rows;
       row += static_cast<int64_t>(gridDim.x) * kRows) {
    write(p.g, row * p.heads + head, rate * softplus(value(p.a, row, head) + bias));
    write(p.beta, row * p.heads + head, beta_scale * sigmoid<float>(value(p.b, row, head)));
  }
}

__global__ void __launch_bounds__(kThreads) gates_backward_kernel(const __grid_constant__ GatesBackwardParams p) {
  __shared__ float sums[2][kRows][kLanes];
  wait_for_predecessor();
  release_successor();
  const int lane = threadIdx.x % kLanes, own_row = threadIdx.x / kLanes;
  const int64_t head = static_cast<int64_t>(blockIdx.y) * kLanes + lane;
  float dlog_decay = 0.0f, ddt_bias = 0.0f;
  if (head < p.heads) {
    const float rate = -expf(value(p.log_decay, head));
    const float bias = value(p.dt_bias, head);
    const float beta_scale = static_cast<float>(p.beta_scale);
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + own_row; row < p.rows;
         row += static_cast<int64_t>(gridDim.x) * kRows) {
      const float step = value(p.a, row, head) + bias;
      const float upstream = value(p.dg, row, head) * rate;
      const float dstep = upstream * sigmoid<float>(step);
      const float opening = sigmoid<float>(value(p.b, row, head));
      dlog_decay += upstream * softplus(step);
      ddt_bias += dstep;
      write(p.da, row * p.heads + head, dstep);
      write(p.db, row * p.heads + head, value(p.dbeta, row, head) * beta_scale * opening * (1.0f - opening));
    }
  }
  if (!p.partials) return;
  sums[0][own_row][lane] = dlog_decay;
  sums[1][own_row][lane] = ddt_bias;
  __syncthreads();
  if (own_row >= 2 || head >= p.heads) return;  // one row of threads for each of the two sums
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kRows; ++i) total += sums[own_row][i][lane];
  static_cast<float*>(p.partials)[(static_cast<int64_t>(blockIdx.x) * 2 + own_row) * p.heads + head] = total;
}

// Grid: (heads / kThreads, 2).
__global__ void __launch_bounds__(kThreads) sum_gates_kernel(const __grid_constant__ GatesBackwardParams p) {
  wait_for_predecessor();
  release_successor();
  const int64_t head = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (head >= p.heads) return;
  const float* const partials = static_cast<const float*>(p.partials) + blockIdx.y * p.heads + head;
  float total = 0.0f;
#pragma unroll 16
  for (int64_t i = 0; i < p.partial_rows; ++i) total += partials[i * 2 * p.heads];
  write(blockIdx.y == 0 ? p.dlog_decay : p.ddt_bias, head, total);
}

void require_supported(DType dtype) {
  if (dtype == DType::f64) inlay::cuda::fail("inlay: a must be float32, bfloat16 or float16 on CUDA, got float64");
}

int64_t blocks_for(int64_t rows) { return std::clamp<int64_t>((rows + kRows - 1) / kRows, 1, kBlocks); }

dim3 grid_for(int64_t rows, int64_t heads) {
  return dim3(static_cast<unsigned>(blocks_for(rows)), static_cast<unsigned>((heads + kLanes - 1) / kLanes));
}

}  // namespace
}  // namespace cuda

void gates(const GatesParams& params, void* stream) {
  cuda::require_supported(params.a.dtype);
  inlay::cuda::start<cuda::gates_kernel, cuda::kThreads>(params, cuda::grid_for(params.rows, params.heads), stream);
}

int64_t partial_rows(const GatesBackwardParams& params) { return cuda::blocks_for(params.rows); }

void gates_backward(const GatesBackwardParams& params, void* stream) {
  cuda::require_supported(params.a.dtype);
  inlay::cuda::start<cuda::gates_backward_kernel, cuda::kThreads>(params, cuda::grid_for(params.rows, params.heads),
                                                                  stream);
  if (!params.partials) return;
  const dim3 grid(static_cast<unsigned>((params.heads + cuda::kThreads - 1) / cuda::kThreads), 2);
  inlay::cuda::start<cuda::sum_gates_kernel, cuda::kThreads>(params, grid, stream);
}

}  // namespace inlay::gdn
