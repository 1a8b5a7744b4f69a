// Second kernels of backwards: the sums over all rows, from the partial sums that blocks have left, in an order that
// never changes.
#pragma once

#include <cstdint>

namespace inlay::cuda {

// The sum over `rows` values, `stride` apart, of the column that `column` points at; 0 unless `valid`. A block takes
// kColumns columns, thread i the column i % kColumns: thread rows of the block each add every so many'th value, then
// their sums are added in order. The result is that of the first kColumns threads; all threads must call.
template <int kColumns, int kThreads>
__device__ inline float sum_of_column(const float* column, int64_t rows, int64_t stride, bool valid) {
  constexpr int kThreadRows = kThreads / kColumns;
  __shared__ float sums[kThreadRows][kColumns];
  const int lane = threadIdx.x % kColumns;
  const int first_row = threadIdx.x / kColumns;
  float sum = 0.0f;
  if (valid) {
#pragma unroll 16
    for (int64_t row = first_row; row < rows; row += kThreadRows) sum += column[row * stride];
  }
  sums[first_row][lane] = sum;
  __syncthreads();
  float total = 0.0f;
  if (first_row == 0) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) total += sums[i][lane];
  }
  return total;
}

}  // namespace inlay::cuda
