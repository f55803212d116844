// The oracle's router gradients and losses against central differences of what they differentiate,
// and its exact comparison and random bits against known values: what the router's tests rest on.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <span>

#include "oracle/balancing.hpp"
#include "oracle/rounding.hpp"
#include "oracle/router.hpp"
#include "rig/compare.hpp"
#include "rig/random.hpp"

namespace sonicmoe::rig {
namespace {

const std::span<const Scoring> kScorings = all_scorings();

Values normal(Random& random, std::size_t count) {
  Values values(count);
  for (double& value : values) value = 1.5 * random.normal();
  return values;
}

Values central_differences(Values at, const std::function<double(const Values&)>& f) {
  constexpr double kStep = 1e-5;
  Values gradient;
  for (double& x : at) {
    const double center = x;
    x = center + kStep;
    const double above = f(at);
    x = center - kStep;
    const double below = f(at);
    x = center;
    gradient.push_back((above - below) / (2 * kStep));
  }
  return gradient;
}

void expect_gradient(const Values& gradient, const Values& expected) {
  EXPECT_LE(max_error(gradient, expected), 1e-8 * std::max(1.0, max_abs(expected)));
}

TEST(OracleRouter, WeightGradientsMatchCentralDifferences) {
  Random random(1);
  for (const Scoring scoring : kScorings) {
    for (const bool renormalize : {false, true}) {
      for (const std::int64_t top_k : {1, 3, 8}) {
        RouterOptions options;
        options.scoring = scoring;
        if (scoring != Scoring::kTopKSoftmax) options.renormalize = renormalize;
        options.top_k = top_k;
        options.scale = 2.5f;
        const Values logits = normal(random, 8), grad = normal(random, 8);
        const Ids ids = oracle::select(options, logits);
        // Experts outside the top-K count too: token rounding adds rows.
        const auto loss = [&](const Values& x) {
          const Values weights = oracle::weights(options, x, ids);
          double sum = 0.0;
          for (std::size_t e = 0; e < x.size(); ++e) sum += grad[e] * weights[e];
          return sum;
        };
        expect_gradient(oracle::weights_gradient(options, logits, ids, grad),
                        central_differences(logits, loss));
      }
    }
  }
}

TEST(OracleRouter, LossGradientsMatchCentralDifferences) {
  Random random(2);
  const Values logits = normal(random, 17 * 9);
  for (const Scoring scoring : kScorings) {
    const oracle::Balance balance{scoring, 3, {3, 1, 4, 1, 5, 9, 2, 6, 5}};
    expect_gradient(oracle::load_balancing_loss_gradient(balance, logits),
                    central_differences(logits, [&](const Values& x) {
                      return oracle::load_balancing_loss(balance, x);
                    }));
    EXPECT_GT(max_abs(oracle::load_balancing_loss_gradient(balance, logits)), 1e-3);
  }
  expect_gradient(
      oracle::router_z_loss_gradient(logits, 9),
      central_differences(logits, [&](const Values& x) { return oracle::router_z_loss(x, 9); }));
}

// E sum_e f_e p_e written out once more, without logarithms.
TEST(OracleRouter, BalancingLossIsItsFormula) {
  Random random(3);
  const Values logits = normal(random, 4 * 3);
  for (const Scoring scoring : {Scoring::kSoftmaxTopK, Scoring::kSigmoidTopK}) {
    const oracle::Balance balance{scoring, 2, {5, 1, 2}};
    double expected = 0.0;
    for (std::size_t t = 0; t < 4; ++t) {
      double raw[3], sum = 0.0;
      for (std::size_t e = 0; e < 3; ++e) {
        const double x = std::exp(logits[3 * t + e]);
        sum += raw[e] = scoring == Scoring::kSigmoidTopK ? x / (1 + x) : x;
      }
      for (std::size_t e = 0; e < 3; ++e) {
        expected += 3.0 * static_cast<double>(balance.rows[e]) / (4 * 2) * raw[e] / sum / 4;
      }
    }
    EXPECT_NEAR(oracle::load_balancing_loss(balance, logits), expected, 1e-14);
  }
}

TEST(OracleRounding, SumsAreExact) {
  const float tiny = std::numeric_limits<float>::denorm_min();
  const float huge = std::numeric_limits<float>::max();
  const float infinity = std::numeric_limits<float>::infinity();
  using Floats = std::vector<float>;
  EXPECT_TRUE(oracle::changes_less(Floats{huge, tiny, -huge}, Floats{2 * tiny}));
  EXPECT_FALSE(oracle::changes_less(Floats{huge, tiny, -huge}, Floats{tiny}));
  EXPECT_FALSE(oracle::changes_less(Floats{huge, 2 * tiny, -huge}, Floats{tiny}));
  EXPECT_TRUE(oracle::changes_less(Floats{-1.0f}, Floats{1.0f, tiny}));
  EXPECT_FALSE(oracle::changes_less(Floats{1.0f, tiny}, Floats{-1.0f}));
  EXPECT_TRUE(oracle::changes_less(Floats{huge}, Floats{-infinity}));
  EXPECT_FALSE(oracle::changes_less(Floats{infinity, -infinity}, Floats{infinity}));
}

// The published vector of Philox4x32-10 for counter 0 and key 0.
TEST(OracleRounding, BitsAreThoseOfPhilox) { EXPECT_EQ(oracle::rounding_bits(0, 0), 0x6627e8d5u); }

}  // namespace
}  // namespace sonicmoe::rig
