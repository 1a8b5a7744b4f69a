// Which probabilities dropout keeps: a pure function of a seed and of the position, the same on every device and in the
// backward. The bits come from the counter-based generator Philox 4x32 (Salmon and others, "Parallel random numbers: as
// easy as 1, 2, 3", 2011) with 7 rounds, the fewest that its authors found to pass every test.
//
// One call gives eight keys 16 bits each. They are those that one thread holds of a row of 32 in the accumulators of
// tensor cores: pairs {2t, 2t + 1} + 8n for n = 0 to 3, where t = 0 to 3 numbers the calls of these 32 keys.
#pragma once

#include <cstdint>

#include "common/rows.h"

namespace inlay::attention {

struct Philox {
  uint32_t words[4];

  INLAY_HOST_DEVICE static Philox at(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 7; ++round) {
      const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
      c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
      c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
      c1 = static_cast<uint32_t>(product1);
      c3 = static_cast<uint32_t>(product0);
      key0 += 0x9E3779B9;
      key1 += 0xBB67AE85;
    }
    return {{c0, c1, c2, c3}};
  }
};

struct Dropout {
  const int64_t* seed = nullptr;  // one number on the device; null: no dropout
  uint32_t threshold = 0;         // of 65536: a probability is dropped where its 16 bits are below
  float keep_scale = 1;           // 65536 / (65536 - threshold)

  // The eight numbers of keys {2 quad, 2 quad + 1} + 8 n of the 32 keys from 32 * block on.
  INLAY_HOST_DEVICE static Philox numbers(uint64_t seed, int64_t sequence, int64_t head, int64_t query, int64_t block,
                                          int64_t quad) {
    return Philox::at(seed, static_cast<uint32_t>(block * 4 + quad), static_cast<uint32_t>(query),
                      static_cast<uint32_t>(head), static_cast<uint32_t>(sequence));
  }
  // Whether to keep key 32 * block + 2 * quad + 8 * n + odd.
  INLAY_HOST_DEVICE bool keeps(const Philox& numbers, int n, int odd) const {
    return ((numbers.words[n] >> (16 * odd)) & 0xffff) >= threshold;
  }
};

}  // namespace inlay::attention
