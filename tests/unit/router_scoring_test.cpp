// Top-K routing against a naive float64 derivation, finite differences and cases done by hand.
#include "router_test_support.hpp"

namespace sonicmoe::router_test {
namespace {

std::vector<float> route_backward_of(const Problem& problem, const std::vector<float>& grad_weights,
                                     int num_threads = 2) {
  const Routed<std::int32_t> routed(problem);
  const Buffer<float> grad(grad_weights, {problem.num_tokens, problem.options.top_k});
  const Buffer<float> grad_logits({problem.num_tokens, problem.num_experts});
  RouteBackwardArgs args;
  args.options = routed.inputs.options;
  args.logits = routed.inputs.logits.view();
  args.topk_ids = routed.ids.view();
  args.grad_topk_weights = grad.view();
  args.grad_logits = grad_logits.view();
  route_backward(context(num_threads), args);
  return grad_logits.values();
}

Problem one_token(Scoring scoring, std::int64_t top_k, std::vector<float> logits) {
  Problem problem;
  problem.num_tokens = 1;
  problem.num_experts = static_cast<std::int64_t>(logits.size());
  problem.options.scoring = scoring;
  problem.options.top_k = top_k;
  problem.logits = std::move(logits);
  return problem;
}

std::vector<std::int32_t> ids_of(const Problem& problem) {
  return Routed<std::int32_t>(problem).ids.values();
}
std::vector<float> weights_of(const Problem& problem) {
  return Routed<std::int32_t>(problem).weights.values();
}

// ------------------------------------------------------------------------------ the comparator

TEST(RouterComparator, RejectsZerosNaNsAndSwappedElements) {
  const std::vector<double> expected{0.5, 0.25, 1e-3};
  EXPECT_TRUE(close(std::vector<float>{0.5f, 0.25f, 1e-3f}, expected, kFloatTolerance));
  EXPECT_FALSE(close(std::vector<float>{0, 0, 0}, expected, kFloatTolerance));
  EXPECT_FALSE(close(std::vector<float>{0.5f, 0.25f, kNaN}, expected, kFloatTolerance));
  EXPECT_FALSE(close(std::vector<float>{0.25f, 0.5f, 1e-3f}, expected, kFloatTolerance));
  EXPECT_FALSE(close(std::vector<float>{0.5f, 0.25f, 0}, expected, kFloatTolerance));
  EXPECT_FALSE(close(std::vector<float>{0.5f, 0.25f}, expected, kFloatTolerance));
}

// ------------------------------------------------------------------------- against the formulas

class RouteConfigs : public ::testing::TestWithParam<Config> {};
INSTANTIATE_TEST_SUITE_P(All, RouteConfigs, ::testing::ValuesIn(all_configs()), config_name);

TEST_P(RouteConfigs, ForwardMatchesTheNaiveDerivation) {
  for (std::uint64_t seed = 1; seed <= 5; ++seed) {
    const Problem problem = GetParam().problem(seed);
    std::vector<std::int64_t> ids;
    std::vector<double> weights;
    std::vector<std::int32_t> rows(at(problem.num_experts));
    for (std::int64_t t = 0; t < problem.num_tokens; ++t) {
      const std::vector<std::int64_t> chosen = naive_select(problem, t);
      for (const std::int64_t id : chosen) {
        ids.push_back(id);
        weights.push_back(naive_weight(problem.options, problem.row(t), chosen, id));
        ++rows[at(id)];
      }
    }
    Routed<std::int64_t> routed(problem);
    EXPECT_EQ(routed.ids.values(), ids);
    EXPECT_TRUE(close(routed.weights.values(), weights, kFloatTolerance));
    EXPECT_EQ(routed.rows.values(), rows);

    Routed<std::int32_t> narrow(problem);
    EXPECT_EQ(narrow.ids.values(), std::vector<std::int32_t>(ids.begin(), ids.end()));
    EXPECT_EQ(narrow.weights.values(), routed.weights.values());
  }
}

TEST_P(RouteConfigs, BackwardMatchesFiniteDifferences) {
  const Problem problem = GetParam().problem(3);
  const std::int64_t top_k = problem.options.top_k;
  const std::vector<float> grad = random_floats(problem.num_tokens * top_k, 77);
  std::vector<double> expected;
  for (std::int64_t t = 0; t < problem.num_tokens; ++t) {
    const std::vector<std::int64_t> ids = naive_select(problem, t);
    const auto loss = [&](const std::vector<double>& logits) {
      double sum = 0.0;
      for (std::int64_t k = 0; k < top_k; ++k) {
        sum += grad[at(t * top_k + k)] * naive_weight(problem.options, logits, ids, ids[at(k)]);
      }
      return sum;
    };
    const std::vector<double> row = finite_differences(problem.row(t), loss);
    expected.insert(expected.end(), row.begin(), row.end());
  }
  const std::vector<float> actual = route_backward_of(problem, grad);
  // A weight that cannot vary (a renormalised single choice) has a gradient of rounding errors.
  const double largest =
      std::abs(*std::max_element(expected.begin(), expected.end(),
                                 [](double a, double b) { return std::abs(a) < std::abs(b); }));
  if (largest > 1e-8) {
    EXPECT_TRUE(close(actual, expected, 1e-6));
  } else {
    for (const float value : actual) EXPECT_NEAR(value, 0.0, 1e-7);
  }
}

TEST_P(RouteConfigs, SameBitsForEveryThreadCount) {
  Problem problem = GetParam().problem(4);
  problem.num_tokens *= 5;
  problem.logits = random_floats(problem.num_tokens * problem.num_experts, 8);
  const std::vector<float> grad = random_floats(problem.num_tokens * problem.options.top_k, 9);
  Routed<std::int32_t> first(problem, 1);
  const std::vector<float> first_grad = route_backward_of(problem, grad, 1);
  for (const int threads : {1, 2, 3}) {
    Routed<std::int32_t> again(problem, threads);
    EXPECT_EQ(again.ids.values(), first.ids.values());
    EXPECT_EQ(again.weights.values(), first.weights.values());
    EXPECT_EQ(again.rows.values(), first.rows.values());
    EXPECT_EQ(route_backward_of(problem, grad, threads), first_grad);
  }
}

TEST_P(RouteConfigs, NoTokens) {
  Config config = GetParam();
  config.num_tokens = 0;
  const Problem problem = config.problem();
  Routed<std::int32_t> routed(problem);
  EXPECT_EQ(routed.rows.values(), std::vector<std::int32_t>(at(problem.num_experts), 0));
  EXPECT_TRUE(route_backward_of(problem, {}).empty());
}

// --------------------------------------------------------------------------------------- by hand

// logits ln 1, ln 2, ln 3, ln 4: softmax 0.1, 0.2, 0.3, 0.4.
std::vector<float> logs_of_1_to_4() {
  return {0.0f, std::log(2.0f), std::log(3.0f), std::log(4.0f)};
}

TEST(RouteByHand, SoftmaxScorings) {
  Problem problem = one_token(Scoring::kSoftmaxTopK, 2, logs_of_1_to_4());
  EXPECT_THAT(ids_of(problem), ::testing::ElementsAre(3, 2));
  EXPECT_TRUE(close(weights_of(problem), std::vector<double>{0.4, 0.3}, kFloatTolerance));
  problem.options.scale = 10.0f;
  EXPECT_TRUE(close(weights_of(problem), std::vector<double>{4.0, 3.0}, kFloatTolerance));
  problem.options.renormalize = true;
  EXPECT_TRUE(close(weights_of(problem), std::vector<double>{40 / 7.0, 30 / 7.0}, kFloatTolerance));
  problem = one_token(Scoring::kTopKSoftmax, 2, logs_of_1_to_4());
  EXPECT_THAT(ids_of(problem), ::testing::ElementsAre(3, 2));
  EXPECT_TRUE(close(weights_of(problem), std::vector<double>{4 / 7.0, 3 / 7.0}, kFloatTolerance));
}

// sigmoid(ln x) = x / (1 + x): 1/2, 2/3, 3/4, 4/5.
TEST(RouteByHand, SigmoidScoringAndItsDefaults) {
  Problem problem = one_token(Scoring::kSigmoidTopK, 2, logs_of_1_to_4());
  const double sum = 0.8 + 0.75;
  EXPECT_TRUE(
      close(weights_of(problem), std::vector<double>{0.8 / sum, 0.75 / sum}, kFloatTolerance));
  problem.options.renormalize = false;
  EXPECT_TRUE(close(weights_of(problem), std::vector<double>{0.8, 0.75}, kFloatTolerance));
  // The bias selects expert 0 but does not enter its weight.
  problem.bias = {1.0f, 0.0f, 0.0f, 0.0f};
  EXPECT_THAT(ids_of(problem), ::testing::ElementsAre(0, 3));
  EXPECT_TRUE(close(weights_of(problem), std::vector<double>{0.5, 0.8}, kFloatTolerance));
}

TEST(RouteByHand, BackwardOfTheFullSoftmaxReachesUnchosenExperts) {
  const Problem problem = one_token(Scoring::kSoftmaxTopK, 1, logs_of_1_to_4());
  EXPECT_TRUE(close(route_backward_of(problem, {1.0f}),
                    std::vector<double>{-0.4 * 0.1, -0.4 * 0.2, -0.4 * 0.3, 0.4 * 0.6}, 1e-6));
  const Problem chosen = one_token(Scoring::kTopKSoftmax, 2, logs_of_1_to_4());
  const double product = 4 / 7.0 * 3 / 7.0;
  EXPECT_TRUE(close(route_backward_of(chosen, {1.0f, 0.0f}),
                    std::vector<double>{0.0, 0.0, -product, product}, 1e-6));
}

// ------------------------------------------------------------------------------ ties and groups

TEST(RouteTies, GoToTheLowerExpert) {
  for (const Scoring scoring :
       {Scoring::kTopKSoftmax, Scoring::kSoftmaxTopK, Scoring::kSigmoidTopK}) {
    EXPECT_THAT(ids_of(one_token(scoring, 3, {1, 2, 2, 2, 2, 0})), ::testing::ElementsAre(1, 2, 3));
    EXPECT_THAT(ids_of(one_token(scoring, 2, {-0.0f, 0.0f, -0.0f})), ::testing::ElementsAre(0, 1));
    EXPECT_THAT(ids_of(one_token(scoring, 2, {0.0f, -0.0f, 0.0f})), ::testing::ElementsAre(0, 1));
    EXPECT_THAT(ids_of(one_token(scoring, 2, {-7, -5, -5, -7})), ::testing::ElementsAre(1, 2));
  }
}

TEST(RouteTies, SigmoidComparesFloat32ScoresSoftmaxComparesLogits) {
  const std::vector<float> saturated{20.0f, 30.0f, 40.0f};  // every float32 sigmoid is 1
  EXPECT_THAT(ids_of(one_token(Scoring::kSigmoidTopK, 1, saturated)), ::testing::ElementsAre(0));
  EXPECT_THAT(ids_of(one_token(Scoring::kSoftmaxTopK, 1, saturated)), ::testing::ElementsAre(2));
  // Both softmax values underflow to 0 in float32.
  EXPECT_THAT(ids_of(one_token(Scoring::kSoftmaxTopK, 2, {-300.0f, -200.0f, 0.0f})),
              ::testing::ElementsAre(2, 1));
}

Problem grouped(std::vector<float> bias, std::int64_t num_groups, std::int64_t top_groups,
                std::int64_t top_k) {
  // Equal sigmoids, so that the bias alone decides: biased score = 0.5 + bias.
  Problem problem = one_token(Scoring::kSigmoidTopK, top_k, std::vector<float>(bias.size(), 0.0f));
  problem.options.num_groups = num_groups;
  problem.options.top_groups = top_groups;
  problem.bias = std::move(bias);
  return problem;
}

TEST(RouteGroups, RankByTheSumOfTheirTopTwo) {
  // Group 0 has the best expert, group 1 the best pair (1.0 + 0.5 against 1.5 + -0.5).
  EXPECT_THAT(ids_of(grouped({1.0f, -1.0f, -1.0f, 0.5f, 0.0f, -1.0f}, 2, 1, 2)),
              ::testing::ElementsAre(3, 4));
  // The third of a group does not count.
  EXPECT_THAT(ids_of(grouped({0.5f, 0.5f, -9.0f, 0.25f, 0.25f, 0.25f}, 2, 1, 2)),
              ::testing::ElementsAre(0, 1));
}

TEST(RouteGroups, OfOneExpertRankByThatExpert) {
  EXPECT_THAT(ids_of(grouped({0.0f, 3.0f, 1.0f, 2.0f}, 4, 2, 2)), ::testing::ElementsAre(1, 3));
}

TEST(RouteGroups, TiesGoToTheLowerGroup) {
  EXPECT_THAT(ids_of(grouped(std::vector<float>(6, 0.25f), 3, 1, 2)), ::testing::ElementsAre(0, 1));
  EXPECT_THAT(ids_of(grouped({0, 0, 1, 0, 0, 1}, 3, 1, 1)), ::testing::ElementsAre(2));
}

TEST(RouteGroups, ExpertsOfOtherGroupsNeverWin) {
  // Scores of the selected group 1 are negative beyond its second expert, others are positive.
  const std::vector<float> bias{0.0f, 0.0f, 0.0f, 5.0f, 5.0f, -9.0f};
  EXPECT_THAT(ids_of(grouped(bias, 2, 1, 3)), ::testing::ElementsAre(3, 4, 5));
  EXPECT_THAT(ids_of(grouped({-3, -2, -9, -9, -1, -9}, 3, 1, 2)), ::testing::ElementsAre(1, 0));
  EXPECT_THAT(ids_of(grouped({-3, -kInf, -9, -9, -8, -9}, 3, 1, 2)), ::testing::ElementsAre(4, 5));
}

TEST(RouteBias, MinusInfinityKeepsAnExpertFromBeingChosen) {
  Problem problem = one_token(Scoring::kSigmoidTopK, 2, {5, 0, 1});
  problem.bias = {-kInf, 0, 0};
  EXPECT_THAT(ids_of(problem), ::testing::ElementsAre(2, 1));
}

// ------------------------------------------------------------------------------------- extremes

TEST(RouteExtremes, LargeLogitsNeitherOverflowNorVanish) {
  for (const Scoring scoring :
       {Scoring::kTopKSoftmax, Scoring::kSoftmaxTopK, Scoring::kSigmoidTopK}) {
    for (const float shift : {-3e38f, -1e4f, 1e4f, 3e38f}) {
      Problem problem = one_token(scoring, 2, {shift, shift, shift, shift});
      problem.options.renormalize = true;
      const double expected = scoring == Scoring::kSigmoidTopK && shift < 0 ? 0.0 : 0.5;
      EXPECT_THAT(weights_of(problem), ::testing::ElementsAre(expected, expected));
      for (const float value : route_backward_of(problem, {1.0f, -2.0f})) {
        EXPECT_TRUE(std::isfinite(value));
      }
    }
  }
}

TEST(RouteExtremes, MaskedExpertsGetWeightZero) {
  for (const Scoring scoring :
       {Scoring::kTopKSoftmax, Scoring::kSoftmaxTopK, Scoring::kSigmoidTopK}) {
    Problem problem = one_token(scoring, 3, {-kInf, 1.0f, -kInf, 1.0f});
    problem.options.renormalize = true;
    EXPECT_THAT(ids_of(problem), ::testing::ElementsAre(1, 3, 0));
    EXPECT_TRUE(close(weights_of(problem), std::vector<double>{0.5, 0.5, 0.0}, kFloatTolerance));
    const std::vector<float> gradient = route_backward_of(problem, {1.0f, 2.0f, 3.0f});
    EXPECT_EQ(gradient[0], 0.0f);
    EXPECT_EQ(gradient[2], 0.0f);
    EXPECT_LT(gradient[1], 0.0f);
    EXPECT_GT(gradient[3], 0.0f);
  }
}

TEST(RouteExtremes, SigmoidGradientDoesNotCancel) {
  Problem problem = one_token(Scoring::kSigmoidTopK, 2, {30.0f, -30.0f});
  problem.options.renormalize = false;
  const double slope = std::exp(-30.0) / std::pow(1 + std::exp(-30.0), 2);
  EXPECT_TRUE(close(route_backward_of(problem, {1.0f, 1.0f}), std::vector<double>{slope, slope},
                    kFloatTolerance));
}

// --------------------------------------------------------------------------------------- errors

TEST(RouteErrors, NaNNamesTheFirstTokenForEveryThreadCount) {
  if (!on_cpu()) GTEST_SKIP() << "only the CPU looks for NaN";
  for (const Config& config : all_configs()) {
    Problem problem = config.problem();
    problem.num_tokens = 500;
    problem.logits = random_floats(problem.num_tokens * problem.num_experts, 2);
    for (const std::int64_t token : {499, 333, 217}) {
      problem.logits[at((token + 1) * problem.num_experts - 1)] = kNaN;
      for (const int threads : {1, 2, 3}) {
        const std::string message =
            error_of("logits", [&] { Routed<std::int32_t> routed(problem, threads); });
        EXPECT_THAT(message, ::testing::HasSubstr("NaN for token " + std::to_string(token)));
      }
    }
  }
}

TEST(RouteErrors, InfiniteLogits) {
  if (!on_cpu()) GTEST_SKIP() << "only the CPU looks for infinities";
  for (const Scoring scoring : {Scoring::kTopKSoftmax, Scoring::kSoftmaxTopK}) {
    const auto call = [&](std::vector<float> logits) {
      return error_of("logits", [&] { ids_of(one_token(scoring, 1, std::move(logits))); });
    };
    EXPECT_THAT(call({0.0f, kInf}), ::testing::HasSubstr("inf for token 0"));
    EXPECT_THAT(call({-kInf, -kInf}), ::testing::HasSubstr("-inf for token 0"));
  }
  Problem problem = one_token(Scoring::kSigmoidTopK, 2, {-kInf, kInf});
  EXPECT_THAT(ids_of(problem), ::testing::ElementsAre(1, 0));
  EXPECT_THAT(weights_of(problem), ::testing::ElementsAre(1.0f, 0.0f));
}

TEST(RouteErrors, BiasThatIsNoNumber) {
  if (!on_cpu()) GTEST_SKIP() << "only the CPU looks for NaN";
  Problem problem = one_token(Scoring::kSigmoidTopK, 1, {0.0f, 0.0f});
  for (const float bad : {kNaN, kInf}) {
    problem.bias = {0.0f, bad};
    EXPECT_THAT(error_of("selection_bias", [&] { ids_of(problem); }),
                ::testing::HasSubstr("expert 1"));
  }
}

TEST(RouteErrors, Options) {
  const auto expect = [](const std::string& argument, const std::function<void(Problem&)>& spoil) {
    Problem problem;
    problem.num_tokens = 2;
    problem.num_experts = 6;
    problem.logits = random_floats(12, 1);
    problem.options.top_k = 2;
    problem.options.scoring = Scoring::kSigmoidTopK;
    EXPECT_NO_THROW(ids_of(problem));
    spoil(problem);
    EXPECT_FALSE(error_of(argument, [&] { ids_of(problem); }).empty());
  };
  expect("top_k", [](Problem& p) { p.options.top_k = 0; });
  expect("top_k", [](Problem& p) { p.options.top_k = 7; });
  expect("renormalize", [](Problem& p) {
    p.options.scoring = Scoring::kTopKSoftmax;
    p.options.renormalize = false;
  });
  for (const Scoring scoring : {Scoring::kTopKSoftmax, Scoring::kSoftmaxTopK}) {
    expect("selection_bias", [&](Problem& p) {
      p.options.scoring = scoring;
      p.bias.assign(6, 0.0f);
    });
    expect("num_groups", [&](Problem& p) {
      p.options.scoring = scoring;
      p.options.num_groups = 2;
      p.options.top_groups = 2;
    });
  }
  expect("num_groups", [](Problem& p) { p.options.num_groups = 4; });
  expect("num_groups", [](Problem& p) { p.options.num_groups = 0; });
  expect("top_groups", [](Problem& p) { p.options.top_groups = 2; });
  expect("top_groups", [](Problem& p) { p.options.top_groups = 0; });
  expect("top_k", [](Problem& p) {
    p.options.num_groups = 6;
    p.options.top_groups = 1;
  });
}

struct ForwardBuffers {
  Buffer<float> logits{random_floats(3 * 4, 1), {3, 4}};
  Buffer<std::int32_t> ids{{3, 2}};
  Buffer<float> weights{{3, 2}};
  Buffer<std::int32_t> rows{{4}};
  RouteForwardArgs args;

  ForwardBuffers() {
    args.options.top_k = 2;
    args.logits = logits.view();
    args.topk_ids = ids.view();
    args.topk_weights = weights.view();
    args.rows_per_expert = rows.view();
  }
};

TEST(RouteErrors, ForwardShapesAndDtypes) {
  const auto expect = [](const std::string& argument,
                         const std::function<void(ForwardBuffers&)>& spoil) {
    ForwardBuffers buffers;
    EXPECT_NO_THROW(route_forward(context(), buffers.args));
    spoil(buffers);
    error_of(argument, [&] { route_forward(context(), buffers.args); });
  };
  expect("logits", [](ForwardBuffers& b) { b.args.logits = {}; });
  expect("logits", [](ForwardBuffers& b) { b.args.logits = b.logits.reshaped({12}); });
  expect("logits",
         [](ForwardBuffers& b) { b.args.logits = b.logits.view_as(DType::kInt32, {3, 4}); });
  expect("logits", [](ForwardBuffers& b) { b.args.logits = transposed(b.args.logits, 0, 1); });
  expect("topk_ids", [](ForwardBuffers& b) { b.args.topk_ids = {}; });
  expect("topk_ids", [](ForwardBuffers& b) { b.args.topk_ids = b.weights.view(); });
  expect("topk_ids", [](ForwardBuffers& b) { b.args.topk_ids = b.ids.reshaped({2, 3}); });
  expect("topk_weights", [](ForwardBuffers& b) { b.args.topk_weights = b.ids.view(); });
  expect("topk_weights",
         [](ForwardBuffers& b) { b.args.topk_weights = b.weights.reshaped({2, 3}); });
  expect("rows_per_expert",
         [](ForwardBuffers& b) { b.args.rows_per_expert = b.rows.reshaped({3}); });
  ForwardBuffers without_rows;
  without_rows.args.rows_per_expert = {};
  EXPECT_NO_THROW(route_forward(context(), without_rows.args));
}

struct BackwardBuffers {
  Buffer<float> logits{random_floats(3 * 4, 1), {3, 4}};
  Buffer<std::int64_t> ids{{0, 1, 2, 3, 1, 0}, {3, 2}};
  Buffer<float> grad_weights{random_floats(3 * 2, 2), {3, 2}};
  Buffer<float> grad_logits{{3, 4}};
  RouteBackwardArgs args;

  BackwardBuffers() {
    args.options.top_k = 2;
    args.logits = logits.view();
    args.topk_ids = ids.view();
    args.grad_topk_weights = grad_weights.view();
    args.grad_logits = grad_logits.view();
  }
};

TEST(RouteErrors, BackwardShapes) {
  const auto expect = [](const std::string& argument,
                         const std::function<void(BackwardBuffers&)>& spoil) {
    BackwardBuffers buffers;
    EXPECT_NO_THROW(route_backward(context(), buffers.args));
    spoil(buffers);
    error_of(argument, [&] { route_backward(context(), buffers.args); });
  };
  expect("logits", [](BackwardBuffers& b) { b.args.logits = {}; });
  expect("topk_ids", [](BackwardBuffers& b) { b.args.topk_ids = b.ids.reshaped({2, 3}); });
  expect("grad_topk_weights",
         [](BackwardBuffers& b) { b.args.grad_topk_weights = b.grad_weights.reshaped({2, 3}); });
  expect("grad_logits",
         [](BackwardBuffers& b) { b.args.grad_logits = b.grad_logits.reshaped({4, 3}); });
  expect("top_k", [](BackwardBuffers& b) { b.args.options.top_k = 5; });
}

TEST(RouteErrors, BackwardIdsThatAreNotATopK) {
  if (!on_cpu()) GTEST_SKIP() << "only the CPU looks at the ids";
  for (const std::int64_t bad :
       {std::int64_t{-1}, std::int64_t{4}, std::int64_t{2}, std::int64_t{1} << 40}) {
    BackwardBuffers buffers;
    buffers.ids.assign({0, 1, 2, bad, 1, 0});
    EXPECT_THAT(error_of("topk_ids", [&] { route_backward(context(), buffers.args); }),
                ::testing::HasSubstr("token 1"));
  }
}

TEST(RouterNames, RoundTripAndListTheLegalOnes) {
  for (const Scoring scoring :
       {Scoring::kTopKSoftmax, Scoring::kSoftmaxTopK, Scoring::kSigmoidTopK}) {
    EXPECT_EQ(scoring_from_name(name_of(scoring)), scoring);
  }
  EXPECT_EQ(name_of(Scoring::kSoftmaxTopK), "softmax_topk");
  EXPECT_THAT(error_of("scoring", [] { scoring_from_name("softmax"); }),
              ::testing::HasSubstr("topk_softmax, softmax_topk, sigmoid_topk"));
  using enum RoundingPolicy;
  for (const RoundingPolicy policy :
       {kNearest, kUp, kDown, kStochastic, kBalanced, kNearestScore}) {
    EXPECT_EQ(rounding_policy_from_name(name_of(policy)), policy);
  }
  EXPECT_EQ(name_of(kNearestScore), "nearest_score");
  EXPECT_THAT(error_of("policy", [] { rounding_policy_from_name("Nearest"); }),
              ::testing::HasSubstr("nearest, up, down, stochastic, balanced, nearest_score"));
}

}  // namespace
}  // namespace sonicmoe::router_test
