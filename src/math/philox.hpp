// Philox4x32-10: a counter-based random generator (Salmon et al., "Parallel random numbers: as easy
// as 1, 2, 3", SC 2011). A pure function of (counter, key), so every backend draws the same bits.
#pragma once

#include <cstdint>

#include "math/host_device.hpp"

namespace sonicmoe {

struct PhiloxCounter {
  std::uint32_t word[4];
  bool operator==(const PhiloxCounter&) const = default;
};
struct PhiloxKey {
  std::uint32_t word[2];
};

SONICMOE_HD PhiloxCounter philox4x32_10(PhiloxCounter counter, PhiloxKey key) {
  std::uint32_t (&c)[4] = counter.word;
  std::uint32_t (&k)[2] = key.word;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * c[0];
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * c[2];
    c[0] = static_cast<std::uint32_t>(product1 >> 32) ^ c[1] ^ k[0];
    c[1] = static_cast<std::uint32_t>(product1);
    c[2] = static_cast<std::uint32_t>(product0 >> 32) ^ c[3] ^ k[1];
    c[3] = static_cast<std::uint32_t>(product0);
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  return counter;
}

/// The 32 random bits of (seed, expert) that token rounding's `stochastic` policy compares: word 0
/// for counter (expert, 0, 0, 0) and key (low, high half of seed).
SONICMOE_HD std::uint32_t rounding_bits(std::uint64_t seed, std::uint32_t expert) {
  return philox4x32_10({{expert, 0, 0, 0}},
                       {{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)}})
      .word[0];
}

}  // namespace sonicmoe
