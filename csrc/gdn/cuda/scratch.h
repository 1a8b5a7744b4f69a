// How the chunk kernels' scratch memory is divided up.
#pragma once

#include "gdn/params.h"

namespace inlay::gdn::cuda {

inline constexpr int kTokens = static_cast<int>(kChunk);
inline constexpr int kMatrix = kTokens * kTokens;

// What is known of each of a chunk's tokens for one value head: rows of float32 [kTokens]. kLogDecay is cumulated, and
// to base 2.
enum Factor : int { kKeyIn, kQueryIn, kKeyOut, kBeta, kLogDecay, kKeyLength, kQueryLength, kFactors };

// What prepare_kernel leaves, for [chunk number][value head]. Blocks of 16x16 above the diagonal are not written.
struct Prepared {
  void* inverse;   // [kTokens, kTokens] T
  void* scores;    // [kTokens, kTokens] T
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
  int64_t units() const { return inputs_.sequences.chunk_bound(kChunk) * inputs_.value_heads; }

 private:
  char* next_;
  const Inputs& inputs_;
};

class BackwardScratch : public ChunkScratch {
 public:
  BackwardScratch(const Inputs& inputs, void* memory) : ChunkScratch(inputs, memory) {
    const int64_t values = inputs.batch * inputs.sequences.tokens * inputs.value_heads * inputs.value_dim;
    const int64_t state = inputs.key_dim * inputs.value_dim;
    u = take(values * element());
    w = take(values * element());
    states = take(units() * state * element());
    dstates = take(units() * state * element());
  }

  void* u;        // [B, T, Hv, V] T
  void* w;        // the same
  void* states;   // [chunk number][Hv][V, K] T, before each chunk
  void* dstates;  // the gradients of those after each chunk
};

}  // namespace inlay::gdn::cuda
