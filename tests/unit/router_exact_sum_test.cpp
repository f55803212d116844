#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <compare>
#include <limits>
#include <random>
#include <vector>

#include "math/exact_sum.hpp"
#include "math/order.hpp"

namespace sonicmoe {
namespace {

ExactSum sum_of(const std::vector<float>& values) {
  ExactSum sum{};
  for (const float value : values) sum.add(value);
  return sum;
}

std::strong_ordering compare(const std::vector<float>& a, const std::vector<float>& b) {
  ExactSum left = sum_of(a), right = sum_of(b);
  const bool less = ExactSum::magnitude_is_less(left, right);
  const bool greater = ExactSum::magnitude_is_less(right, left);
  EXPECT_FALSE(less && greater);
  return int{greater} <=> int{less};
}

constexpr float kMax = std::numeric_limits<float>::max();
constexpr float kTiny = std::numeric_limits<float>::denorm_min();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(ExactSum, SeesWhatRoundingLoses) {
  EXPECT_EQ(compare({}, {}), std::strong_ordering::equal);
  EXPECT_EQ(compare({kTiny}, {}), std::strong_ordering::greater);
  EXPECT_EQ(compare({1.0f, kTiny}, {1.0f}), std::strong_ordering::greater);
  EXPECT_EQ(compare({kMax, kMax, kTiny}, {kMax, kMax}), std::strong_ordering::greater);
  EXPECT_EQ(compare({kMax, 1.0f, -kMax}, {1.0f}), std::strong_ordering::equal);
  EXPECT_EQ(compare({kMax, kTiny, -kMax}, {-kTiny}), std::strong_ordering::equal);
  EXPECT_EQ(compare({0.1f, 0.2f, 0.3f}, {0.3f, 0.1f, 0.2f}), std::strong_ordering::equal);
}

TEST(ExactSum, ComparesMagnitudes) {
  EXPECT_EQ(compare({-2.0f}, {1.0f}), std::strong_ordering::greater);
  EXPECT_EQ(compare({-1.0f}, {2.0f}), std::strong_ordering::less);
  EXPECT_EQ(compare({-1.5f, -1.5f}, {3.0f}), std::strong_ordering::equal);
  EXPECT_EQ(compare({-1.0f, 1.0f}, {0.0f, -0.0f}), std::strong_ordering::equal);
}

TEST(ExactSum, InfiniteTermsMakeAnInfiniteMagnitude) {
  EXPECT_EQ(compare({-kInfinity}, {kMax, kMax}), std::strong_ordering::greater);
  EXPECT_EQ(compare({kMax}, {kInfinity}), std::strong_ordering::less);
  EXPECT_EQ(compare({kInfinity}, {-kInfinity}), std::strong_ordering::equal);
}

// Integers below 2^24 with sums below 2^53: double is exact.
TEST(ExactSum, AgreesWithDoubleWhereDoubleIsExact) {
  std::mt19937_64 generator(5);
  std::uniform_int_distribution<int> mantissa(-(1 << 20), 1 << 20);
  std::uniform_int_distribution<int> exponent(-12, 8);
  int differing = 0;
  for (int trial = 0; trial < 2000; ++trial) {
    std::vector<float> a;
    std::vector<float> b;
    double sum_a = 0.0;
    double sum_b = 0.0;
    for (int i = 0; i < 40; ++i) {
      a.push_back(std::ldexp(static_cast<float>(mantissa(generator)), exponent(generator)));
      sum_a += double{a.back()};
      b.push_back(i % 7 == 0 ? std::ldexp(static_cast<float>(mantissa(generator)), -12) : a.back());
      sum_b += double{b.back()};
    }
    std::shuffle(b.begin(), b.end(), generator);
    const auto expected = std::abs(sum_a) <=> std::abs(sum_b);
    EXPECT_TRUE(compare(a, b) == expected) << sum_a << " and " << sum_b;
    differing += expected != 0;
  }
  EXPECT_GT(differing, 1000);
}

TEST(OrderedKey, IncreasesWithTheValueAndTiesBothZeros) {
  const std::vector<float> ascending{-kInfinity, -kMax, -1.0f, -kTiny, 0.0f,
                                     kTiny,      1e-3f, 1.0f,  kMax,   kInfinity};
  for (std::size_t i = 0; i < ascending.size(); ++i) {
    EXPECT_EQ(key_value(ordered_key(ascending[i])), ascending[i]);
    if (i > 0) {
      EXPECT_LT(ordered_key(ascending[i - 1]), ordered_key(ascending[i]));
    }
  }
  EXPECT_EQ(ordered_key(-0.0f), ordered_key(0.0f));
  EXPECT_LT(ordered_key(kInfinity), 0xffffffffu);
}

TEST(OrderedKey, NaNIsBelowAllNumbersAndNoValueHasTheOutermostKeys) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_GT(ordered_key(nan), 0u);
  EXPECT_EQ(ordered_key(-nan), ordered_key(nan));
  EXPECT_LT(ordered_key(nan), ordered_key(-kInfinity));
  EXPECT_TRUE(std::isnan(key_value(ordered_key(nan))));
}

TEST(RankingKey, PutsGreaterValuesFirstThenLowerIndices) {
  EXPECT_GT(ranking_key(ordered_key(2.0f), 9), ranking_key(ordered_key(1.0f), 0));
  EXPECT_GT(ranking_key(ordered_key(1.0f), 3), ranking_key(ordered_key(1.0f), 4));
  EXPECT_GT(ranking_key(ordered_key(-0.0f), 3), ranking_key(ordered_key(0.0f), 4));
  for (const std::int32_t index : {0, 1, 511, 2147483646}) {
    EXPECT_EQ(ranking_index(ranking_key(ordered_key(-3.5f), index)), index);
  }
}

}  // namespace
}  // namespace sonicmoe
