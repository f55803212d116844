// round_tokens, forward and backward, against the naive derivation; its guarantees.
#include "router_rounding_support.hpp"

namespace sonicmoe::router_test {
namespace {

class RoundTokens : public ::testing::TestWithParam<Config> {};
INSTANTIATE_TEST_SUITE_P(All, RoundTokens, ::testing::ValuesIn(all_configs()), config_name);

TEST_P(RoundTokens, ForwardMatchesTheNaiveDerivation) {
  for (std::uint64_t seed = 1; seed <= 2; ++seed) {
    const Problem problem = GetParam().problem(seed);
    Routed<std::int32_t> routed(problem);
    const std::vector<std::int32_t> ids = routed.ids.values();
    const std::vector<float> topk_weights = routed.weights.values();
    std::vector<float> scores;
    for (std::int64_t t = 0; t < problem.num_tokens; ++t) {
      const std::vector<float> row = naive_ranking_scores(problem, t);
      scores.insert(scores.end(), row.begin(), row.end());
    }
    for (const RoundingPolicy policy : kPolicies) {
      SCOPED_TRACE(name_of(policy));
      const RoundingOptions options = rounding(8, policy, seed);
      const Selection expected =
          naive_rounding(options, problem.num_tokens, problem.num_experts, scores, ids);
      std::vector<double> weights;
      Rounded rounded(problem, options);
      rounded.run();
      EXPECT_EQ(rounded.ids.values(), ids);
      EXPECT_EQ(rounded.before.values(), expected.before);
      EXPECT_EQ(rounded.after.values(), expected.after);
      EXPECT_EQ(rounded.tokens.values(), padded(expected.tokens, rounded.capacity, -1));
      EXPECT_EQ(rounded.experts.values(), padded(expected.experts, rounded.capacity, -1));
      const std::vector<float> actual = rounded.weights.values();
      for (std::size_t i = 0; i < expected.tokens.size(); ++i) {
        const std::int64_t t = expected.tokens[i];
        const std::vector<std::int64_t> chosen = naive_select(problem, t);
        weights.push_back(
            naive_weight(problem.options, problem.row(t), chosen, expected.experts[i]));
        const auto found = std::find(chosen.begin(), chosen.end(), expected.experts[i]);
        if (found != chosen.end()) {  // rows kept keep their weight, bit for bit
          EXPECT_EQ(actual[i],
                    topk_weights[at(t * problem.options.top_k + (found - chosen.begin()))]);
        }
      }
      EXPECT_TRUE(close(actual, padded(weights, rounded.capacity, 0.0), kFloatTolerance));
      if (HasFailure()) return;
    }
  }
}

TEST_P(RoundTokens, BackwardMatchesFiniteDifferences) {
  const Problem problem = GetParam().problem(5);
  for (const RoundingPolicy policy : {kUp, kDown, kNearest}) {
    SCOPED_TRACE(name_of(policy));
    Rounded rounded(problem, rounding(8, policy));
    rounded.run();
    const std::vector<std::int32_t> tokens = rounded.tokens.values();
    const std::vector<std::int32_t> experts = rounded.experts.values();
    std::vector<float> grad = random_floats(rounded.capacity, 6);
    std::vector<double> expected;
    for (std::int64_t t = 0; t < problem.num_tokens; ++t) {
      const std::vector<std::int64_t> ids = naive_select(problem, t);
      const std::vector<double> row = finite_differences(problem.row(t), [&](const auto& logits) {
        double sum = 0.0;
        for (std::size_t i = 0; i < tokens.size(); ++i) {
          if (tokens[i] == t)
            sum += grad[i] * naive_weight(problem.options, logits, ids, experts[i]);
        }
        return sum;
      });
      expected.insert(expected.end(), row.begin(), row.end());
    }
    // Gradients of unused places are not read.
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i] < 0) grad[i] = kNaN;
    }
    const std::vector<float> actual = rounded.backward(grad);
    double largest = 0.0;
    for (const double value : expected) largest = std::max(largest, std::abs(value));
    if (largest > 1e-8) {
      EXPECT_TRUE(close(actual, expected, 1e-6));
    } else {  // renormalised single choices cannot vary
      for (const float value : actual) EXPECT_NEAR(value, 0.0, 1e-6);
    }
  }
}

TEST_P(RoundTokens, Guarantees) {
  for (std::uint64_t seed = 1; seed <= 6; ++seed) {
    const Problem problem = GetParam().problem(seed, 0.5 * static_cast<double>(seed));
    const std::int64_t T = problem.num_tokens;
    const std::int64_t E = problem.num_experts;
    const std::int64_t K = problem.options.top_k;
    for (const std::int64_t tile : {1, 5, 8, 16}) {
      for (const RoundingPolicy policy : kPolicies) {
        SCOPED_TRACE(std::string(name_of(policy)) + ", tile " + std::to_string(tile));
        Rounded rounded(problem, rounding(tile, policy, seed));
        rounded.run();
        const auto before = rounded.before.values();
        const auto after = rounded.after.values();
        const auto tokens = rounded.tokens.values();
        const auto experts = rounded.experts.values();
        const auto ids = rounded.ids.values();
        std::int64_t total = 0;
        bool forced = false;
        for (std::int64_t e = 0; e < E; ++e) {
          EXPECT_EQ(after[at(e)] % tile, 0);
          EXPECT_LT(std::abs(after[at(e)] - before[at(e)]), tile);
          EXPECT_LE(after[at(e)], T);
          total += after[at(e)];
          forced |= (before[at(e)] + tile - 1) / tile * tile > T;
        }
        EXPECT_LE(total, rounded.capacity);
        if (policy == kBalanced && !forced) {
          EXPECT_LE(std::abs(total - T * K), tile / 2);
        }
        std::vector<bool> chosen(at(T * E));
        for (std::int64_t i = 0; i < T * K; ++i) chosen[at(i / K * E + ids[at(i)])] = true;
        std::int64_t both = 0;
        for (std::int64_t i = 0; i < total; ++i) {
          both += chosen[at(tokens[at(i)] * E + experts[at(i)])];
          if (i == 0) continue;
          EXPECT_TRUE(experts[at(i - 1)] < experts[at(i)] ||
                      (experts[at(i - 1)] == experts[at(i)] && tokens[at(i - 1)] < tokens[at(i)]));
        }
        if (policy == kDown) {
          EXPECT_EQ(both, total);  // a subset of token choice
        } else if (policy == kUp && !forced) {
          EXPECT_EQ(both, T * K);  // a superset
        }
        if (tile == 1) {
          EXPECT_EQ(after, before);
          EXPECT_EQ(both, T * K);
        }
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(RoundTokens, SameBitsForEveryThreadCount) {
  Problem problem = GetParam().problem(2);
  problem.num_tokens *= 4;
  problem.logits = random_floats(problem.num_tokens * problem.num_experts, 12);
  for (const RoundingPolicy policy : {kNearest, kNearestScore, kStochastic}) {
    Rounded first(problem, rounding(16, policy, 7));
    first.run(1);
    const std::vector<float> grad = random_floats(first.capacity, 3);
    for (const int threads : {1, 2, 3}) {
      Rounded again(problem, rounding(16, policy, 7));
      again.run(threads);
      EXPECT_EQ(again.tokens.values(), first.tokens.values());
      EXPECT_EQ(again.experts.values(), first.experts.values());
      EXPECT_EQ(again.weights.values(), first.weights.values());
      EXPECT_EQ(again.backward(grad, threads), first.backward(grad, 1));
    }
  }
}

TEST(RoundTokensExamples, ATokenMayEndWithNoneOrWithMoreThanK) {
  // K = 1. Expert 0 is everyone's choice; expert 1 gets one row and adds another.
  Problem problem;
  problem.num_tokens = 4;
  problem.num_experts = 2;
  problem.logits = {3, 0, 2, 0, 1, 0, 0, 1};
  Rounded up(problem, rounding(2, kUp));
  up.run();
  EXPECT_THAT(up.tokens.values(), ::testing::ElementsAre(0, 1, 2, 3, 2, 3));
  Rounded down(problem, rounding(2, kDown));
  down.run();
  EXPECT_THAT(down.tokens.values(), ::testing::ElementsAre(0, 1, -1, -1));
}

// The bias turns token 0 away from expert 0, whose score is e^3 times that of its choice.
TEST(RoundTokensExamples, AddedRowsMayWeighMoreThanTheTopK) {
  Problem problem;
  problem.num_tokens = 2;
  problem.num_experts = 2;
  problem.options.scoring = Scoring::kSigmoidTopK;
  problem.bias = {-0.95f, 0.0f};
  problem.logits = {3, -3, 3, -10};
  Rounded up(problem, rounding(2, kUp));
  up.run();
  EXPECT_THAT(up.ids.values(), ::testing::ElementsAre(1, 0));
  EXPECT_THAT(up.tokens.values(), ::testing::ElementsAre(0, 1, 0, 1));
  const double last = naive_sigmoid(-10) / naive_sigmoid(3);
  EXPECT_TRUE(
      close(up.weights.values(), std::vector<double>{std::exp(3.0), 1, 1, last}, kFloatTolerance));
}

// ------------------------------------------------------------------------------------------ errors

TEST(RoundTokensErrors, Arguments) {
  const Problem problem = Config{"", 10, 4, 2, Scoring::kSigmoidTopK}.problem();
  const auto expect = [&](const std::string& argument, const std::function<void(Rounded&)>& spoil) {
    Rounded rounded(problem, rounding(4, kNearest));
    EXPECT_NO_THROW(rounded.run());
    spoil(rounded);
    error_of(argument, [&] { rounded.run(); });
  };
  expect("tile", [](Rounded& r) { r.args.rounding.tile = 11; });
  expect("tile", [](Rounded& r) { r.args.rounding.tile = 0; });
  expect("token_ids", [](Rounded& r) { r.args.rounding.policy = kUp; });  // another P
  expect("token_ids", [](Rounded& r) { r.args.token_ids = r.weights.view(); });
  expect("expert_ids", [](Rounded& r) { r.args.expert_ids = r.after.view(); });
  expect("pair_weights", [](Rounded& r) { r.args.pair_weights = r.tokens.view(); });
  expect("topk_ids", [](Rounded& r) { r.args.topk_ids = r.ids.reshaped({2, 10}); });
  expect("rows_per_expert", [](Rounded& r) { r.args.rows_per_expert = r.after.reshaped({2, 2}); });
  expect("rows_per_expert_before",
         [](Rounded& r) { r.args.rows_per_expert_before = r.ids.view(); });
  expect("seed_tensor", [](Rounded& r) { r.args.rounding.seed_tensor = r.after.view(); });
  expect("workspace", [](Rounded& r) { r.args.workspace = {}; });
  expect("workspace", [](Rounded& r) {
    r.args.workspace =
        TensorView(r.workspace.view().data(), DType::kUInt8, {workspace_bytes(10, 4, 2) - 1});
  });
  expect("logits", [](Rounded& r) { r.args.logits = {}; });
  expect("top_k", [](Rounded& r) { r.args.options.top_k = 5; });
  Rounded without_counts(problem, rounding(4, kNearest));
  without_counts.args.rows_per_expert = {};
  without_counts.args.rows_per_expert_before = {};
  EXPECT_NO_THROW(without_counts.run());
}

TEST(RoundTokensErrors, NaNNamesTheFirstToken) {
  if (!on_cpu()) GTEST_SKIP() << "only the CPU looks for NaN";
  for (const Config& config : all_configs()) {
    Problem problem = config.problem();
    problem.num_tokens = 300;
    problem.logits = random_floats(problem.num_tokens * problem.num_experts, 1);
    problem.logits[at(299 * problem.num_experts)] = kNaN;
    problem.logits[at(201 * problem.num_experts)] = kNaN;
    for (const int threads : {1, 2, 3}) {
      Rounded rounded(problem, rounding(8, kNearest));
      EXPECT_THAT(error_of("logits", [&] { rounded.run(threads); }),
                  ::testing::HasSubstr("NaN for token 201"));
    }
  }
}

TEST(RoundTokensErrors, BackwardIdsThatAreNotATopK) {
  if (!on_cpu()) GTEST_SKIP() << "only the CPU looks at the ids";
  const Problem problem = Config{"", 10, 4, 2, Scoring::kSoftmaxTopK}.problem();
  Rounded rounded(problem, rounding(4, kNearest));
  rounded.run();
  std::vector<std::int32_t> ids = rounded.ids.values();
  ids[3] = 4;
  rounded.ids.assign(ids);
  EXPECT_THAT(error_of("topk_ids", [&] { rounded.backward(random_floats(rounded.capacity, 1)); }),
              ::testing::HasSubstr("token 1"));
}

}  // namespace
}  // namespace sonicmoe::router_test
