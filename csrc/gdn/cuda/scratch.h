// How the chunk kernels' scratch memory is divided up.
#pragma once

#include "gdn/params.h"

namespace inlay::gdn::cuda {

inline constexpr int kTokens = static_cast<int>(kChunk);
inline constexpr int kMatrix = kTokens * kTokens;

inline constexpr int kSlice = 64;  // columns of V that are worked on together

INLAY_HOST_DEVICE inline int64_t value_slices(const Inputs& inputs) { return (inputs.value_dim + kSlice - 1) / kSlice; }

// What is known of each of a chunk's tokens for one value head: rows of float32 [kTokens]. kLogDecay is cumulated, and
// to base 2.
enum Factor : int { kKeyIn, kQueryIn, kKeyOut, kBeta, kLogDecay, kKeyLength, kQueryLength, kFactors };

// What K is rounded up to: kernels are made for these.
inline int64_t padded_keys(const Inputs& inputs) {
  return inputs.key_dim <= 64 ? 64 : inputs.key_dim <= 128 ? 128 : 256;
}

// What prepare_kernel leaves, for [chunk number][value head]. Images are tiles as they lie in shared memory
// (common/cuda/tile.cuh).
struct Prepared {
  void* inverse;   // images [kTokens, kTokens] T
  void* scores;    // the same
  float* factors;  // [kFactors, kTokens]
};

// Each part at a multiple of 16 bytes from the start. `memory` may be null where only `bytes` is wanted.
class ChunkScratch {
 public:
  ChunkScratch(const Inputs& inputs, void* memory) : next_(static_cast<char*>(memory)), inputs_(inputs) {
    prepared.inverse = take(units() * kMatrix * element());
    prepared.scores = take(units() * kMatrix * element());
    prepared.factors = reinterpret_cast<float*>(take(units() * kFactors * kTokens * 4));
  }

  Prepared prepared;
  int64_t bytes = 0;

 protected:
  void* take(int64_t size) {
    size = (size + 15) / 16 * 16;
    bytes += size;
    char* const part = next_;
    if (next_) next_ += size;
    return part;
  }
  int64_t element() const { return size_of(inputs_.q.dtype); }
  // Chunk numbers times value heads.
  int64_t units() const { return chunks() * inputs_.value_heads; }
  int64_t chunks() const { return inputs_.sequences.chunk_bound(kChunk); }

 private:
  char* next_;
  const Inputs& inputs_;
};

class BackwardScratch : public ChunkScratch {
 public:
  BackwardScratch(const Inputs& inputs, void* memory) : ChunkScratch(inputs, memory) {
    const int64_t slices = units() * value_slices(inputs);
    u = take(slices * kMatrix * element());
    w = take(slices * kMatrix * element());
    states = take(slices * kSlice * padded_keys(inputs) * element());
    dstates = take(slices * kSlice * padded_keys(inputs) * element());
  }

  // Images for [chunk number][value head][slice of V]:
  void* u;        // [kSlice, kTokens] T
  void* w;        // the same
  void* states;   // [kSlice, padded K] T, before each chunk
  void* dstates;  // the gradients of those after each chunk
};

}  // namespace inlay::gdn::cuda
