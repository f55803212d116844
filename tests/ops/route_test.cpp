// Top-K routing on every target: against the oracle, bit for bit where something is chosen, and
// against cases worked out by hand.
#include "ops/router_fixture.hpp"

namespace sonicmoe::rig {
namespace {

class Route : public RouterTest {};
INSTANTIATE_TEST_SUITE_P(Targets, Route, ::testing::ValuesIn(targets()), target_name);

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<Config> large_configs() {
  using enum Scoring;
  return {
      {1000, 32, 4, kTopKSoftmax},
      {333, 33, 33, kTopKSoftmax, {}, false, 1, 1, 2.0f},
      {517, 64, 8, kSoftmaxTopK},
      {517, 100, 8, kSoftmaxTopK, true},
      {300, 256, 8, kSigmoidTopK, {}, true, 8, 4, 2.5f},
      {300, 256, 8, kSigmoidTopK, false, true, 256, 20, 2.5f},
      {129, 300, 40, kSigmoidTopK, {}, true},
      {65, 512, 22, kSoftmaxTopK},
      {65, 1024, 33, kSoftmaxTopK, true},
      {40, 1025, 10, kTopKSoftmax},
      {40, 1536, 10, kSigmoidTopK, {}, true, 6, 2},
      {2000, 128, 8, kTopKSoftmax},
      {1000, 512, 10, kTopKSoftmax},
      {400, 48, 6, kTopKSoftmax, {}, false, 1, 1, 1.0f, true},
      {400, 512, 10, kTopKSoftmax, {}, false, 1, 1, 1.0f, true},
      {200, 700, 32, kSoftmaxTopK, {}, false, 1, 1, 1.0f, true},
      {400, 48, 6, kSigmoidTopK, {}, false, 4, 2, 1.0f, true},
  };
}

TEST_P(Route, MatchesTheDefinition) {
  std::vector<Config> configs = small_configs();
  for (const Config& config : large_configs()) configs.push_back(config);
  bool wide = false;
  for (const Config& config : configs) {
    for (std::uint64_t seed = 1; seed <= (config.num_tokens < 200 ? 3u : 1u); ++seed) {
      const RouterProblem problem = config.problem(seed);
      SCOPED_TRACE(problem.describe());
      const Values grad = make_logits(problem.num_tokens, config.top_k, 0.0, false, seed + 7);
      wide = !wide;
      EXPECT_THAT(
          differences(run_route(target(), problem, grad, wide ? DType::kInt64 : DType::kInt32),
                      expected_route(problem, grad)),
          ::testing::IsEmpty());
    }
  }
}

TEST_P(Route, SameBitsForEveryThreadCountAndRun) {
  std::vector<Config> configs = small_configs();
  configs.push_back({2000, 128, 8, Scoring::kSigmoidTopK, {}, false, 8, 4});
  for (Config config : configs) {
    config.num_tokens = std::max<std::int64_t>(config.num_tokens, 200);
    const RouterProblem problem = config.problem(4);
    SCOPED_TRACE(problem.describe());
    const Values grad = make_logits(problem.num_tokens, config.top_k, 0.0, false, 9);
    const RouterResult first = route(problem, grad, 1);
    for (const int threads : {1, 2, 3}) {
      const RouterResult again = route(problem, grad, threads);
      EXPECT_EQ(again.topk_ids, first.topk_ids);
      EXPECT_EQ(again.weights, first.weights);
      EXPECT_EQ(again.rows_per_expert, first.rows_per_expert);
      EXPECT_EQ(again.grad_logits, first.grad_logits);
    }
  }
}

TEST_P(Route, NoTokens) {
  for (Config config : small_configs()) {
    config.num_tokens = 0;
    const RouterResult result = route(config.problem());
    EXPECT_EQ(result.rows_per_expert, Values(at(config.num_experts), 0.0));
    EXPECT_TRUE(result.grad_logits.empty());
  }
}

// --------------------------------------------------------------------------------------- by hand

// logits ln 1, ln 2, ln 3, ln 4: softmax 0.1, 0.2, 0.3, 0.4; sigmoid 1/2, 2/3, 3/4, 4/5.
Values logs_of_1_to_4() { return {0.0, std::log(2.0), std::log(3.0), std::log(4.0)}; }

TEST_P(Route, SoftmaxScoringsByHand) {
  RouterProblem problem = one_token(Scoring::kSoftmaxTopK, 2, logs_of_1_to_4());
  EXPECT_THAT(route(problem).topk_ids, ElementsAre(3, 2));
  expect_close(route(problem).weights, {0.4, 0.3});
  problem.options.scale = 10.0f;
  expect_close(route(problem).weights, {4.0, 3.0});
  problem.options.renormalize = true;
  expect_close(route(problem).weights, {40 / 7.0, 30 / 7.0});
  problem = one_token(Scoring::kTopKSoftmax, 2, logs_of_1_to_4());
  EXPECT_THAT(route(problem).topk_ids, ElementsAre(3, 2));
  expect_close(route(problem).weights, {4 / 7.0, 3 / 7.0});
}

TEST_P(Route, SigmoidScoringAndItsDefaultsByHand) {
  RouterProblem problem = one_token(Scoring::kSigmoidTopK, 2, logs_of_1_to_4());
  const double sum = 0.8 + 0.75;
  expect_close(route(problem).weights, {0.8 / sum, 0.75 / sum});
  problem.options.renormalize = false;
  expect_close(route(problem).weights, {0.8, 0.75});
  // The bias selects expert 0 but does not enter its weight.
  problem.bias = {1.0, 0.0, 0.0, 0.0};
  EXPECT_THAT(route(problem).topk_ids, ElementsAre(0, 3));
  expect_close(route(problem).weights, {0.5, 0.8});
}

TEST_P(Route, BackwardOfTheFullSoftmaxReachesUnchosenExperts) {
  const RouterProblem problem = one_token(Scoring::kSoftmaxTopK, 1, logs_of_1_to_4());
  expect_close(route(problem).grad_logits, {-0.4 * 0.1, -0.4 * 0.2, -0.4 * 0.3, 0.4 * 0.6}, 1e-6);
  const RouterProblem chosen = one_token(Scoring::kTopKSoftmax, 2, logs_of_1_to_4());
  const double product = 4 / 7.0 * 3 / 7.0;
  expect_close(route(chosen, {1.0, 0.0}).grad_logits, {0.0, 0.0, -product, product}, 1e-6);
}

// ------------------------------------------------------------------------------ ties and groups

TEST_P(Route, TiesGoToTheLowerExpert) {
  for (const Scoring scoring : kScorings) {
    const auto ids = [&](std::int64_t top_k, Values logits) {
      return route(one_token(scoring, top_k, std::move(logits))).topk_ids;
    };
    EXPECT_THAT(ids(3, {1, 2, 2, 2, 2, 0}), ElementsAre(1, 2, 3));
    EXPECT_THAT(ids(2, {-0.0, 0.0, -0.0}), ElementsAre(0, 1));
    EXPECT_THAT(ids(2, {0.0, -0.0, 0.0}), ElementsAre(0, 1));
    EXPECT_THAT(ids(2, {-7, -5, -5, -7}), ElementsAre(1, 2));
  }
}

TEST_P(Route, SigmoidComparesFloat32ScoresSoftmaxComparesLogits) {
  const Values saturated{20.0, 30.0, 40.0};  // every float32 sigmoid is 1
  EXPECT_THAT(route(one_token(Scoring::kSigmoidTopK, 1, saturated)).topk_ids, ElementsAre(0));
  EXPECT_THAT(route(one_token(Scoring::kSoftmaxTopK, 1, saturated)).topk_ids, ElementsAre(2));
  // Both softmax values underflow to 0 in float32.
  EXPECT_THAT(route(one_token(Scoring::kSoftmaxTopK, 2, {-300.0, -200.0, 0.0})).topk_ids,
              ElementsAre(2, 1));
}

// Equal sigmoids, so that the bias alone decides: biased score = 0.5 + bias.
RouterProblem grouped(Values bias, std::int64_t num_groups, std::int64_t top_groups,
                      std::int64_t top_k) {
  RouterProblem problem = one_token(Scoring::kSigmoidTopK, top_k, Values(bias.size(), 0.0));
  problem.options.num_groups = num_groups;
  problem.options.top_groups = top_groups;
  problem.bias = std::move(bias);
  return problem;
}

TEST_P(Route, GroupsRankByTheSumOfTheirTopTwo) {
  // Group 0 has the best expert, group 1 the best pair (1.0 + 0.5 against 1.5 + -0.5).
  EXPECT_THAT(route(grouped({1.0, -1.0, -1.0, 0.5, 0.0, -1.0}, 2, 1, 2)).topk_ids,
              ElementsAre(3, 4));
  // The third of a group does not count.
  EXPECT_THAT(route(grouped({0.5, 0.5, -9.0, 0.25, 0.25, 0.25}, 2, 1, 2)).topk_ids,
              ElementsAre(0, 1));
  // A group of one expert ranks by that expert.
  EXPECT_THAT(route(grouped({0.0, 3.0, 1.0, 2.0}, 4, 2, 2)).topk_ids, ElementsAre(1, 3));
}

TEST_P(Route, TiesGoToTheLowerGroup) {
  EXPECT_THAT(route(grouped(Values(6, 0.25), 3, 1, 2)).topk_ids, ElementsAre(0, 1));
  EXPECT_THAT(route(grouped({0, 0, 1, 0, 0, 1}, 3, 1, 1)).topk_ids, ElementsAre(2));
}

TEST_P(Route, ExpertsOfOtherGroupsNeverWin) {
  // Scores of the selected group 1 are negative beyond its second expert, others are positive.
  EXPECT_THAT(route(grouped({0.0, 0.0, 0.0, 5.0, 5.0, -9.0}, 2, 1, 3)).topk_ids,
              ElementsAre(3, 4, 5));
  EXPECT_THAT(route(grouped({-3, -2, -9, -9, -1, -9}, 3, 1, 2)).topk_ids, ElementsAre(1, 0));
  EXPECT_THAT(route(grouped({-3, -kInfinity, -9, -9, -8, -9}, 3, 1, 2)).topk_ids,
              ElementsAre(4, 5));
}

TEST_P(Route, ABiasOfMinusInfinityKeepsAnExpertFromBeingChosen) {
  RouterProblem problem = one_token(Scoring::kSigmoidTopK, 2, {5, 0, 1});
  problem.bias = {-kInfinity, 0, 0};
  EXPECT_THAT(route(problem).topk_ids, ElementsAre(2, 1));
}

// ------------------------------------------------------------------------------------- extremes

TEST_P(Route, LargeLogitsNeitherOverflowNorVanish) {
  for (const Scoring scoring : kScorings) {
    for (const float shift : {-3e38f, -1e4f, 1e4f, 3e38f}) {
      RouterProblem problem = one_token(scoring, 2, Values(4, shift));
      problem.options.renormalize = true;
      // A softmax does not see the shift; other scores underflow.
      const double expected = traits_of(scoring).biased && shift < 0 ? 0.0 : 0.5;
      const RouterResult result = route(problem, {1.0, -2.0});
      EXPECT_THAT(result.weights, ElementsAre(expected, expected));
      for (const double value : result.grad_logits) EXPECT_TRUE(std::isfinite(value));
    }
  }
}

TEST_P(Route, MaskedExpertsGetWeightZero) {
  for (const Scoring scoring : kScorings) {
    RouterProblem problem = one_token(scoring, 3, {-kInfinity, 1.0, -kInfinity, 1.0});
    problem.options.renormalize = true;
    const RouterResult result = route(problem, {1.0, 2.0, 3.0});
    EXPECT_THAT(result.topk_ids, ElementsAre(1, 3, 0));
    expect_close(result.weights, {0.5, 0.5, 0.0});
    EXPECT_EQ(result.grad_logits[0], 0.0);
    EXPECT_EQ(result.grad_logits[2], 0.0);
    EXPECT_LT(result.grad_logits[1], 0.0);
    EXPECT_GT(result.grad_logits[3], 0.0);
  }
}

TEST_P(Route, SigmoidGradientDoesNotCancel) {
  RouterProblem problem = one_token(Scoring::kSigmoidTopK, 2, {30.0, -30.0});
  problem.options.renormalize = false;
  const double slope = std::exp(-30.0) / std::pow(1 + std::exp(-30.0), 2);
  expect_close(route(problem).grad_logits, {slope, slope});
}

TEST_P(Route, ANaNNeverGivesAnIdOutOfRange) {
  if (on_cpu()) GTEST_SKIP() << "the CPU refuses a NaN";
  for (const Scoring scoring : kScorings) {
    RouterProblem problem = Config{3, 40, 4, scoring}.problem();
    std::fill(problem.logits.begin(), problem.logits.end(), kNaN);  // token 0: nothing else
    for (std::size_t i = 1; i < problem.logits.size(); i += 3) problem.logits[i] = 1.0;
    for (const double id : route(problem).topk_ids) {
      EXPECT_GE(id, 0);
      EXPECT_LT(id, problem.num_experts);
    }
  }
}

// --------------------------------------------------------------------------------------- errors

TEST_P(Route, NaNNamesTheFirstTokenForEveryThreadCount) {
  if (!on_cpu()) GTEST_SKIP() << "only the CPU looks for NaN";
  for (Config config : small_configs()) {
    config.num_tokens = 500;
    RouterProblem problem = config.problem();
    for (const std::int64_t token : {499, 333, 217}) {
      problem.logits[at((token + 1) * problem.num_experts - 1)] = kNaN;
      for (const int threads : {1, 2, 3}) {
        EXPECT_THAT(error_of("logits", [&] { route(problem, {}, threads); }),
                    HasSubstr("NaN for token " + std::to_string(token)));
      }
    }
  }
}

TEST_P(Route, InfiniteLogits) {
  if (!on_cpu()) GTEST_SKIP() << "only the CPU looks for infinities";
  for (const Scoring scoring : {Scoring::kTopKSoftmax, Scoring::kSoftmaxTopK}) {
    const auto message = [&](Values logits) {
      return error_of("logits", [&] { route(one_token(scoring, 1, std::move(logits))); });
    };
    EXPECT_THAT(message({0.0, kInfinity}), HasSubstr("inf for token 0"));
    EXPECT_THAT(message({-kInfinity, -kInfinity}), HasSubstr("-inf for token 0"));
  }
  const RouterProblem problem = one_token(Scoring::kSigmoidTopK, 2, {-kInfinity, kInfinity});
  EXPECT_THAT(route(problem).topk_ids, ElementsAre(1, 0));
  EXPECT_THAT(route(problem).weights, ElementsAre(1.0, 0.0));
}

TEST_P(Route, BiasThatIsNoNumber) {
  if (!on_cpu()) GTEST_SKIP() << "only the CPU looks for NaN";
  RouterProblem problem = one_token(Scoring::kSigmoidTopK, 1, {0.0, 0.0});
  for (const double bad : {kNaN, kInfinity}) {
    problem.bias = {0.0, bad};
    EXPECT_THAT(error_of("selection_bias", [&] { route(problem); }), HasSubstr("expert 1"));
  }
}

// Rules between options; each option's own range is in arguments_test.cpp.
TEST_P(Route, OptionsThatDoNotGoTogether) {
  const auto expect = [&](const std::string& argument,
                          const std::function<void(RouterProblem&)>& spoil) {
    RouterProblem problem = Config{2, 6, 2, Scoring::kSigmoidTopK}.problem();
    EXPECT_NO_THROW(route(problem));
    spoil(problem);
    EXPECT_FALSE(error_of(argument, [&] { route(problem); }).empty());
  };
  for (const Scoring scoring : {Scoring::kTopKSoftmax, Scoring::kSoftmaxTopK}) {
    expect("selection_bias", [&](RouterProblem& p) {
      p.options.scoring = scoring;
      p.bias.assign(6, 0.0);
    });
    expect("num_groups", [&](RouterProblem& p) {
      p.options.scoring = scoring;
      p.options.num_groups = p.options.top_groups = 2;
    });
  }
  expect("num_groups", [](RouterProblem& p) { p.options.num_groups = 4; });
  expect("top_groups", [](RouterProblem& p) { p.options.top_groups = 2; });
  expect("top_k", [](RouterProblem& p) {
    p.options.num_groups = 6;
    p.options.top_groups = 1;
  });
}

TEST_P(Route, BackwardIdsThatAreNotATopK) {
  if (!on_cpu()) GTEST_SKIP() << "only the CPU looks at the ids";
  const auto floats = [&](std::vector<std::int64_t> shape, std::uint64_t seed) {
    Tensor tensor(target(), DType::kFloat32, shape);
    tensor.fill(make_logits(shape[0], shape[1], 0.0, false, seed));
    return tensor;
  };
  const Tensor logits = floats({3, 4}, 1), grad = floats({3, 2}, 2);
  const Tensor grad_logits(target(), DType::kFloat32, {3, 4});
  Tensor ids(target(), DType::kInt64, {3, 2});
  RouterOptions options;
  options.top_k = 2;
  for (const std::int64_t bad :
       {std::int64_t{-1}, std::int64_t{4}, std::int64_t{2}, std::int64_t{1} << 40}) {
    ids.fill_ids({0, 1, 2, bad, 1, 0});
    const auto call = [&] {
      route_backward(target().context(),
                     {options, logits.view(), ids.view(), grad.view(), grad_logits.view()});
    };
    EXPECT_THAT(error_of("topk_ids", call), HasSubstr("token 1"));
  }
}

}  // namespace
}  // namespace sonicmoe::rig
