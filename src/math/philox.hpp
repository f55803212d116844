// Philox4x32-10: a counter-based random generator (Salmon et al., "Parallel random numbers: as easy
// as 1, 2, 3", SC 2011). A pure function of (counter, key), so every backend draws the same bits.
#pragma once

#include <array>
#include <cstdint>

namespace sonicmoe {

using PhiloxCounter = std::array<std::uint32_t, 4>;
using PhiloxKey = std::array<std::uint32_t, 2>;

constexpr PhiloxCounter philox4x32_10(PhiloxCounter counter, PhiloxKey key) noexcept {
  constexpr std::uint64_t kMultiplier0 = 0xD2511F53u;
  constexpr std::uint64_t kMultiplier1 = 0xCD9E8D57u;
  constexpr std::uint32_t kWeyl0 = 0x9E3779B9u;
  constexpr std::uint32_t kWeyl1 = 0xBB67AE85u;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = kMultiplier0 * counter[0];
    const std::uint64_t product1 = kMultiplier1 * counter[2];
    counter = {static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key[0],
               static_cast<std::uint32_t>(product1),
               static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key[1],
               static_cast<std::uint32_t>(product0)};
    key[0] += kWeyl0;
    key[1] += kWeyl1;
  }
  return counter;
}

/// The 32 random bits of (seed, expert) that token rounding's `stochastic` policy compares: word 0
/// for counter (expert, 0, 0, 0) and key (low, high half of seed).
constexpr std::uint32_t rounding_bits(std::uint64_t seed, std::uint32_t expert) noexcept {
  return philox4x32_10({expert, 0, 0, 0}, {static_cast<std::uint32_t>(seed),
                                           static_cast<std::uint32_t>(seed >> 32)})[0];
}

}  // namespace sonicmoe
