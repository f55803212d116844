// What the router's tests share: every one runs on every target and is compared with the oracle.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "rig/compare.hpp"
#include "rig/moe_run.hpp"
#include "rig/random.hpp"
#include "rig/router_run.hpp"
#include "sonicmoe/error.hpp"

namespace sonicmoe::rig {

inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline const std::span<const RoundingPolicy> kPolicies = all_rounding_policies();
inline const std::span<const Scoring> kScorings = all_scorings();

inline std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

/// |actual - expected| <= tolerance * max|expected|, and something to compare.
inline void expect_close(const Values& actual, const Values& expected,
                         double tolerance = kOneRounding) {
  ASSERT_GT(max_abs(expected), 0.0);
  EXPECT_LE(max_error(actual, expected), tolerance * max_abs(expected))
      << ::testing::PrintToString(actual) << ", expected " << ::testing::PrintToString(expected);
}

/// Runs `call`, expects an Error about `argument`, and returns its message.
inline std::string error_of(const std::string& argument, const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.argument(), argument) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "no Error about " << argument;
  return {};
}

/// Logits whose experts differ in popularity, so that row counts differ; `ties` rounds them so that
/// many are equal.
inline Values make_logits(std::int64_t num_tokens, std::int64_t num_experts, double skew, bool ties,
                          std::uint64_t seed) {
  Random random(seed);
  Values values;
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    for (std::int64_t e = 0; e < num_experts; ++e) {
      const double value =
          1.5 * random.normal() + skew * static_cast<double>(e) / static_cast<double>(num_experts);
      values.push_back(static_cast<float>(ties ? std::round(2 * value) / 2 : value));
    }
  }
  return values;
}

/// One router of many: what RouterProblem leaves to be chosen, in one line.
struct Config {
  std::int64_t num_tokens, num_experts, top_k;
  Scoring scoring;
  std::optional<bool> renormalize = {};
  bool bias = false;
  std::int64_t num_groups = 1, top_groups = 1;
  float scale = 1.0f;
  bool ties = false;

  RouterProblem problem(std::uint64_t seed = 1, double skew = 1.0) const {
    RouterProblem p;
    p.num_tokens = num_tokens;
    p.num_experts = num_experts;
    p.options.top_k = top_k;
    p.options.scoring = scoring;
    p.options.renormalize = renormalize;
    p.options.num_groups = num_groups;
    p.options.top_groups = top_groups;
    p.options.scale = scale;
    p.logits = make_logits(num_tokens, num_experts, skew, ties, seed);
    if (bias) p.bias = make_logits(1, num_experts, 0.0, false, seed + 1000);
    return p;
  }
};

/// Every scoring with and without renormalisation, bias, groups and scale, at small shapes.
inline std::vector<Config> small_configs() {
  using enum Scoring;
  return {
      {70, 12, 3, kTopKSoftmax},
      {65, 16, 4, kTopKSoftmax, true, false, 1, 1, 2.5f},
      {70, 12, 3, kSoftmaxTopK},
      {33, 32, 8, kSoftmaxTopK, false, false, 1, 1, 0.5f},
      {130, 12, 4, kSoftmaxTopK, true},
      {70, 12, 3, kSigmoidTopK},
      {64, 12, 3, kSigmoidTopK, false, false, 1, 1, 3.0f},
      {70, 16, 4, kSigmoidTopK, true, true, 1, 1, 2.5f},
      {129, 16, 4, kSigmoidTopK, true, true, 4, 2, 2.5f},
      {40, 18, 5, kSigmoidTopK, false, true, 6, 2},
      {40, 8, 3, kSigmoidTopK, {}, true, 8, 3},
      {40, 10, 1, kSoftmaxTopK},
      {40, 10, 1, kTopKSoftmax},
      {40, 6, 6, kSoftmaxTopK},
      {40, 6, 6, kTopKSoftmax},
      {40, 6, 6, kSigmoidTopK, {}, true},
      {40, 1, 1, kSoftmaxTopK},
      {40, 1, 1, kSigmoidTopK, false},
      {20, 200, 8, kTopKSoftmax},
      {1, 1, 1, kSoftmaxTopK},
      {8, 2, 2, kTopKSoftmax},
  };
}

class RouterTest : public ::testing::TestWithParam<Target> {
 protected:
  const Target& target() const { return GetParam(); }
  bool on_cpu() const { return target().device.type == DeviceType::kCpu; }

  RouterResult route(const RouterProblem& problem, Values grad = {}, int threads = 0) const {
    if (grad.empty()) grad.assign(at(problem.num_tokens * problem.options.top_k), 1.0);
    const RouterResult result = run_route(target(), problem, grad, DType::kInt32, threads);
    EXPECT_THAT(result.violations, ::testing::IsEmpty());
    return result;
  }
  RouterResult round(const RouterProblem& problem, const RoundingOptions& rounding,
                     int threads = 0) const {
    const std::int64_t P =
        rounded_capacity(problem.num_tokens, problem.num_experts, problem.options.top_k, rounding);
    const RouterResult result =
        run_round_tokens(target(), problem, rounding, make_logits(1, P, 0, false, 9), threads);
    EXPECT_THAT(result.violations, ::testing::IsEmpty());
    return result;
  }
};

inline RoundingOptions rounding(std::int64_t tile, RoundingPolicy policy, std::uint64_t seed = 0) {
  RoundingOptions options;
  options.tile = tile;
  options.policy = policy;
  options.seed = seed;
  return options;
}

inline RouterProblem one_token(Scoring scoring, std::int64_t top_k, Values logits) {
  RouterProblem problem;
  problem.num_tokens = 1;
  problem.num_experts = static_cast<std::int64_t>(logits.size());
  problem.options.scoring = scoring;
  problem.options.top_k = top_k;
  problem.logits = std::move(logits);
  return problem;
}

inline std::string target_name(const ::testing::TestParamInfo<Target>& info) {
  return info.param.backend + (info.param.device.type == DeviceType::kCuda ? "_cuda" : "_cpu");
}

}  // namespace sonicmoe::rig
