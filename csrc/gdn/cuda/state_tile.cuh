// Some columns of one head's state, held in a block's registers from its first token to its last:
//
//   u = beta (v - exp(g) S^T k)
//   S <- exp(g) S + k u^T
//   o = scale S^T q
//
// Threads stand in a grid: kColumnLanes of them side by side, each with four columns, in kGroups groups, each with
// kRows rows of K. Columns do not depend on each other. A token's sums over K are taken together, all of the state
// before it (S^T q after the token is exp(g) S^T q + u <k, q>): each thread adds its rows, and one thread a column adds
// the groups, always in the same order and rounded alike. So a column's numbers depend on kRows, but not on the width
// of the tile that it is in.
#pragma once

#include "common/cuda/vector.cuh"
#include "gdn/params.h"

namespace inlay::gdn::cuda {

using namespace inlay::cuda;

inline constexpr int kLaneColumns = 4;
inline constexpr int kGroups = 16;
inline constexpr int kPiece = kHeadDimMultiple;  // elements of a row of q or k that a lane takes at once

// What the block's threads tell each other of a few tokens.
template <int kRows, int kColumnLanes, int kTokens>
struct TileShared {
  static constexpr int kKeys = kGroups * kRows;  // K at most; zeros beyond it
  static constexpr int kColumns = kLaneColumns * kColumnLanes;

  alignas(16) float q[kTokens][kKeys];  // ready for use: normalised if wanted, and scaled
  alignas(16) float k[kTokens][kKeys];
  alignas(16) float partial[kGroups][2][kColumns];  // S^T k and S^T q of each group's rows
  alignas(16) float update[kColumns];
  float dot[kTokens];  // <k, q>
  float decay[kTokens];
  float beta[kTokens];

  // One warp makes a token's q and k ready. `piece(row, part)` reads elements [8 part, 8 part + 8) of q (row 0) or k.
  template <class Piece>
  __device__ void prepare_keys(int token, int keys, float scale, bool l2norm, Piece piece) {
    static_assert(kKeys <= 32 * kPiece);
    const int lane = threadIdx.x % 32;
    float q_part[kPiece] = {}, k_part[kPiece] = {};
    if (lane * kPiece < keys) {
      piece(0, lane, q_part);
      piece(1, lane, k_part);
    }
    float sums[3] = {};  // <q, q>, <k, k>, <k, q>
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      sums[0] = __fmaf_rn(q_part[i], q_part[i], sums[0]);
      sums[1] = __fmaf_rn(k_part[i], k_part[i], sums[1]);
      sums[2] = __fmaf_rn(k_part[i], q_part[i], sums[2]);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
      for (float& sum : sums) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    const auto inverse_length = [&](float square_sum) {
      return l2norm ? 1.0f / sqrtf(square_sum + static_cast<float>(kL2Eps)) : 1.0f;
    };
    const float q_factor = inverse_length(sums[0]) * scale;
    const float k_factor = inverse_length(sums[1]);
    if (lane == 0) dot[token] = sums[2] * k_factor * q_factor;
    if (lane * kPiece >= kKeys) return;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      q[token][lane * kPiece + i] = q_part[i] * q_factor;
      k[token][lane * kPiece + i] = k_part[i] * k_factor;
    }
  }
};

template <int kRows, int kColumnLanes>
class StateTile {
 public:
  static constexpr int kThreads = kColumnLanes * kGroups;
  static constexpr int kColumns = kLaneColumns * kColumnLanes;
  static constexpr int kKeys = kGroups * kRows;

  // Columns [first_column, first_column + kColumns) of a [keys, values]. `aligned`: all rows start at multiples of 16
  // bytes.
  __device__ StateTile(int keys, int values, int first_column, bool aligned)
      : keys_(keys), values_(values), column_(first_column + lane() * kLaneColumns), aligned_(aligned) {}

  // Asks for the state; null: zeros. Other work may follow until it is widened.
  __device__ void load(const void* data, DType dtype, int64_t offset) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) bits_[r] = {0, 0, 0, 0};
    if (!data || column_ >= values_) return;
    if (dtype == DType::bf16) {
      for_rows(static_cast<const __nv_bfloat16*>(data) + offset, [&](int r, const __nv_bfloat16* entry) {
        const auto row = read(entry);
        *reinterpret_cast<uint2*>(&bits_[r]) = *reinterpret_cast<const uint2*>(&row);
      });
    } else {
      for_rows(static_cast<const float*>(data) + offset, [&](int r, const float* entry) {
        const auto row = read(entry);
        bits_[r] = *reinterpret_cast<const uint4*>(&row);
      });
    }
  }

  __device__ void widen(DType dtype) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const uint4 bits = bits_[r];  // a copy: the floats take the same place
      if (dtype == DType::bf16) {
        unpack(*reinterpret_cast<const Packed<__nv_bfloat16, kLaneColumns>*>(&bits), state_[r]);
      } else {
        unpack(*reinterpret_cast<const Packed<float, kLaneColumns>*>(&bits), state_[r]);
      }
    }
  }

  __device__ void store(void* data, DType dtype, int64_t offset) const {
    if (column_ >= values_) return;
    if (dtype == DType::bf16) {
      for_rows(static_cast<__nv_bfloat16*>(data) + offset,
               [&](int r, __nv_bfloat16* entry) { write(entry, pack<__nv_bfloat16>(state_[r])); });
    } else {
      for_rows(static_cast<float*>(data) + offset, [&](int r, float* entry) { write(entry, pack<float>(state_[r])); });
    }
  }

  // Lets memory bring the state to L2. See norm/cuda/maths.cuh: what is still to be written is not missed.
  __device__ void prefetch(const void* data, DType dtype, int64_t offset) const {
    constexpr int kLineLanes = 128 / (kLaneColumns * sizeof(float));
    if (!data || column_ >= values_ || lane() % kLineLanes != 0) return;
    if (dtype == DType::bf16) {
      for_rows(static_cast<const __nv_bfloat16*>(data) + offset,
               [](int, const __nv_bfloat16* entry) { prefetch_to_l2(entry); });
    } else {
      for_rows(static_cast<const float*>(data) + offset, [](int, const float* entry) { prefetch_to_l2(entry); });
    }
  }

  // One token, whose q, k, decay and beta are in `shared`. The first kColumns threads call value(i) for v and then
  // emit(i, o), with their column's number in the tile, which may lie beyond the last column. All threads must call.
  template <class Shared, class Value, class Emit>
  __device__ void step(Shared& shared, int token, Value value, Emit emit) {
    static_assert(Shared::kColumns == kColumns && Shared::kKeys == kKeys);
    const float* const k = shared.k[token] + group() * kRows;
    const float* const q = shared.q[token] + group() * kRows;
    float known[kLaneColumns] = {}, answer[kLaneColumns] = {};
#pragma unroll
    for (int part = 0; part < kRows; part += kLaneColumns) {
      float keys[kLaneColumns], queries[kLaneColumns];
      unpack(inlay::cuda::load<float, kLaneColumns>(k + part), keys);
      unpack(inlay::cuda::load<float, kLaneColumns>(q + part), queries);
#pragma unroll
      for (int r = 0; r < kLaneColumns; ++r) {
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) {
          known[i] = __fmaf_rn(state_[part + r][i], keys[r], known[i]);
          answer[i] = __fmaf_rn(state_[part + r][i], queries[r], answer[i]);
        }
      }
    }
    inlay::cuda::store(shared.partial[group()][0] + lane() * kLaneColumns, pack<float>(known));
    inlay::cuda::store(shared.partial[group()][1] + lane() * kLaneColumns, pack<float>(answer));
    __syncthreads();
    const int column = threadIdx.x;
    if (column < kColumns) {
      const float decay = shared.decay[token];
      const float known_sum = __fmul_rn(decay, sum_groups(shared, 0, column));
      const float answer_sum = __fmul_rn(decay, sum_groups(shared, 1, column));
      const float update = __fmul_rn(shared.beta[token], __fsub_rn(value(column), known_sum));
      shared.update[column] = update;
      emit(column, __fmaf_rn(update, shared.dot[token], answer_sum));
    }
    __syncthreads();
    float update[kLaneColumns];
    unpack(inlay::cuda::load<float, kLaneColumns>(shared.update + lane() * kLaneColumns), update);
    const float decay = shared.decay[token];
#pragma unroll
    for (int part = 0; part < kRows; part += kLaneColumns) {
      float keys[kLaneColumns];
      unpack(inlay::cuda::load<float, kLaneColumns>(k + part), keys);
#pragma unroll
      for (int r = 0; r < kLaneColumns; ++r) {
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) {
          float& entry = state_[part + r][i];
          entry = __fmaf_rn(keys[r], update[i], __fmul_rn(decay, entry));
        }
      }
    }
  }

 private:
  __device__ static int lane() { return threadIdx.x % kColumnLanes; }
  __device__ static int group() { return threadIdx.x / kColumnLanes; }

  // Calls use(r, entry) with the address of this thread's first column in each of its rows that there are: K is a
  // multiple of kHeadDimMultiple, so rows come and go together.
  template <typename E, class Use>
  __device__ void for_rows(E* state, Use use) const {
    constexpr int kStep = kRows < kHeadDimMultiple ? kRows : static_cast<int>(kHeadDimMultiple);
    const int first = group() * kRows;
    E* const entry = state + (first * values_ + column_);
#pragma unroll
    for (int part = 0; part < kRows; part += kStep) {
      if (first + part >= keys_) return;
#pragma unroll
      for (int r = part; r < part + kStep; ++r) use(r, entry + r * values_);
    }
  }

  template <typename E>
  __device__ Packed<E, kLaneColumns> read(const E* source) const {
    if (aligned_) return inlay::cuda::load<E, kLaneColumns>(source);
    Packed<E, kLaneColumns> packed;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) packed.values[i] = source[i];
    return packed;
  }

  template <typename E>
  __device__ void write(E* target, const Packed<E, kLaneColumns>& packed) const {
    if (aligned_) {
      store_global(target, packed);
    } else {
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) target[i] = packed.values[i];
    }
  }

  // Pairs of pairs: a chain of sixteen additions would be all latency.
  template <class Shared>
  __device__ static float sum_groups(const Shared& shared, int which, int column) {
    float sums[kGroups / 2];
#pragma unroll
    for (int i = 0; i < kGroups / 2; ++i) {
      sums[i] = shared.partial[i][which][column] + shared.partial[i + kGroups / 2][which][column];
    }
    static_assert(kGroups == 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += sums[i + 4];
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
  }

  int keys_, values_, column_;
  bool aligned_;
  union {
    uint4 bits_[kRows];  // as loaded
    float state_[kRows][kLaneColumns];
  };
};

}  // namespace inlay::gdn::cuda
