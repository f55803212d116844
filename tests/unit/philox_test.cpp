#include "math/philox.hpp"

#include <gtest/gtest.h>

#include <set>

namespace sonicmoe {
namespace {

// The known-answer vectors of Random123 (kat_vectors, philox4x32 with 10 rounds).
TEST(Philox, KnownAnswers) {
  EXPECT_EQ(philox4x32_10({0, 0, 0, 0}, {0, 0}),
            (PhiloxCounter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(
      philox4x32_10({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
      (PhiloxCounter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(
      philox4x32_10({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
      (PhiloxCounter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, RoundingBitsTakeSeedAsKeyAndExpertAsCounter) {
  const std::uint64_t seed = 0x299f31d0a4093822u;
  EXPECT_EQ(rounding_bits(seed, 7), philox4x32_10({7, 0, 0, 0}, {0xa4093822, 0x299f31d0}).word[0]);
  EXPECT_EQ(rounding_bits(0, 0), 0x6627e8d5u);
}

TEST(Philox, BothHalvesOfTheSeedAndTheExpertMatter) {
  std::set<std::uint32_t> drawn;
  for (std::uint64_t low = 0; low < 8; ++low) {
    for (std::uint64_t high = 0; high < 8; ++high) {
      for (std::uint32_t expert = 0; expert < 8; ++expert) {
        drawn.insert(rounding_bits(low | high << 32, expert));
      }
    }
  }
  EXPECT_EQ(drawn.size(), 512u);
}

}  // namespace
}  // namespace sonicmoe
