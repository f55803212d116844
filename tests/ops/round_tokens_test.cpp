// Token rounding on every target: against the oracle, the guarantees of the algorithm page, and
// examples. The selection inside it is in round_select_test.cpp.
#include "ops/router_fixture.hpp"

namespace sonicmoe::rig {
namespace {

using enum RoundingPolicy;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class RoundTokens : public RouterTest {};
INSTANTIATE_TEST_SUITE_P(Targets, RoundTokens, ::testing::ValuesIn(targets()), target_name);

TEST_P(RoundTokens, MatchesTheDefinition) {
  std::vector<Config> configs = small_configs();
  using enum Scoring;
  for (const Config& large : std::vector<Config>{{1000, 48, 4, kTopKSoftmax, {}, false, 1, 1, 2.0f},
                                                 {1000, 48, 4, kSoftmaxTopK},
                                                 {1000, 48, 4, kSoftmaxTopK, true},
                                                 {1000, 48, 4, kSigmoidTopK, {}, true, 4, 2, 2.5f},
                                                 {1000, 48, 4, kSigmoidTopK, false},
                                                 {333, 600, 4, kTopKSoftmax},
                                                 {333, 600, 40, kTopKSoftmax},
                                                 {333, 300, 4, kSoftmaxTopK, false},
                                                 {333, 600, 4, kSigmoidTopK, {}, true}}) {
    configs.push_back(large);
  }
  for (const Config& config : configs) {
    const RouterProblem problem = config.problem(3, 2.0);
    const std::int64_t tile = config.num_tokens < 8      ? 1
                              : config.num_tokens < 200  ? 8
                              : config.num_experts > 100 ? 4
                                                         : 32;
    const RouterResult routed = route(problem);
    for (const RoundingPolicy policy : kPolicies) {
      SCOPED_TRACE(problem.describe() + " " + std::string(name_of(policy)));
      const RoundingOptions options = rounding(tile, policy, 3);
      const Values grad = make_logits(
          1, rounded_capacity(config.num_tokens, config.num_experts, config.top_k, options), 0,
          false, 9);
      const RouterResult actual = run_round_tokens(target(), problem, options, grad);
      EXPECT_THAT(differences(actual, expected_round_tokens(problem, options, grad)), IsEmpty());
      // Rows kept keep their weight, bit for bit.
      for (std::size_t p = 0; p < actual.token_ids.size() && actual.token_ids[p] >= 0; ++p) {
        const auto first = at(static_cast<std::int64_t>(actual.token_ids[p]) * config.top_k);
        for (std::size_t k = first; k < first + at(config.top_k); ++k) {
          if (routed.topk_ids[k] != actual.expert_ids[p]) continue;
          EXPECT_EQ(actual.weights[p], routed.weights[k]);
        }
      }
    }
  }
}

TEST_P(RoundTokens, Guarantees) {
  for (const Config& config : small_configs()) {
    for (std::uint64_t seed = 1; seed <= 3; ++seed) {
      const RouterProblem problem = config.problem(seed, 2.0 * static_cast<double>(seed - 1));
      const std::int64_t T = problem.num_tokens, E = problem.num_experts, K = config.top_k;
      for (const std::int64_t tile : {1, 5, 8, 16}) {
        if (tile > T) continue;
        for (const RoundingPolicy policy : kPolicies) {
          SCOPED_TRACE(problem.describe() + " " + std::string(name_of(policy)) + ", tile " +
                       std::to_string(tile));
          const RouterResult r = round(problem, rounding(tile, policy, seed));
          std::int64_t total = 0;
          bool forced = false;
          for (std::int64_t e = 0; e < E; ++e) {
            const auto before = static_cast<std::int64_t>(r.rows_per_expert_before[at(e)]);
            const auto after = static_cast<std::int64_t>(r.rows_per_expert[at(e)]);
            EXPECT_EQ(after % tile, 0);
            EXPECT_LT(std::abs(after - before), tile);
            EXPECT_LE(after, T);
            total += after;
            forced |= (before + tile - 1) / tile * tile > T;
          }
          if (policy == kBalanced && !forced) {
            EXPECT_LE(std::abs(total - T * K), tile / 2);
          }
          std::vector<bool> chosen(at(T * E));
          for (std::size_t i = 0; i < r.topk_ids.size(); ++i) {
            chosen[i / at(K) * at(E) + static_cast<std::size_t>(r.topk_ids[i])] = true;
          }
          std::int64_t both = 0, last = -1;
          for (std::int64_t i = 0; i < total; ++i) {
            const auto t = static_cast<std::int64_t>(r.token_ids[at(i)]);
            const auto e = static_cast<std::int64_t>(r.expert_ids[at(i)]);
            both += chosen[at(t * E + e)];
            EXPECT_LT(last, e * T + t);  // sorted by expert, then token
            last = e * T + t;
          }
          if (policy == kDown) {
            EXPECT_EQ(both, total);  // a subset of token choice
          } else if (policy == kUp && !forced) {
            EXPECT_EQ(both, T * K);  // a superset
          }
          if (tile == 1) {
            EXPECT_EQ(r.rows_per_expert, r.rows_per_expert_before);
            EXPECT_EQ(both, T * K);
          }
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST_P(RoundTokens, SameBitsForEveryThreadCount) {
  for (Config config : small_configs()) {
    config.num_tokens = 4 * config.num_tokens + 16;
    const RouterProblem problem = config.problem(12);
    for (const RoundingPolicy policy : {kNearest, kNearestScore, kStochastic}) {
      const RouterResult first = round(problem, rounding(16, policy, 7), 1);
      for (const int threads : {2, 3}) {
        const RouterResult again = round(problem, rounding(16, policy, 7), threads);
        EXPECT_EQ(again.token_ids, first.token_ids);
        EXPECT_EQ(again.expert_ids, first.expert_ids);
        EXPECT_EQ(again.weights, first.weights);
        EXPECT_EQ(again.grad_logits, first.grad_logits);
      }
    }
  }
}

TEST_P(RoundTokens, ATokenMayEndWithNoneOrWithMoreThanK) {
  // K = 1. Expert 0 is everyone's choice; expert 1 gets one row and adds another.
  RouterProblem problem;
  problem.num_tokens = 4;
  problem.num_experts = 2;
  problem.logits = {3, 0, 2, 0, 1, 0, 0, 1};
  EXPECT_THAT(round(problem, rounding(2, kUp)).token_ids, ElementsAre(0, 1, 2, 3, 2, 3));
  EXPECT_THAT(round(problem, rounding(2, kDown)).token_ids, ElementsAre(0, 1, -1, -1));
}

// The bias turns token 0 away from expert 0, whose score is e^3 times that of its choice.
TEST_P(RoundTokens, AddedRowsMayWeighMoreThanTheTopK) {
  RouterProblem problem;
  problem.num_tokens = 2;
  problem.num_experts = 2;
  problem.options.scoring = Scoring::kSigmoidTopK;
  problem.bias = {-0.95f, 0.0};
  problem.logits = {3, -3, 3, -10};
  const RouterResult up = round(problem, rounding(2, kUp));
  EXPECT_THAT(up.topk_ids, ElementsAre(1, 0));
  EXPECT_THAT(up.token_ids, ElementsAre(0, 1, 0, 1));
  const auto sigmoid = [](double x) { return 1.0 / (1.0 + std::exp(-x)); };
  expect_close(up.weights, {std::exp(3.0), 1, 1, sigmoid(-10) / sigmoid(3)});
}

TEST_P(RoundTokens, NaNNamesTheFirstToken) {
  if (!on_cpu()) GTEST_SKIP() << "only the CPU looks for NaN";
  for (Config config : small_configs()) {
    config.num_tokens = 300;
    RouterProblem problem = config.problem();
    problem.logits[at(299 * problem.num_experts)] = kNaN;
    problem.logits[at(201 * problem.num_experts)] = kNaN;
    for (const int threads : {1, 2, 3}) {
      EXPECT_THAT(error_of("logits", [&] { round(problem, rounding(8, kNearest), threads); }),
                  HasSubstr("NaN for token 201"));
    }
  }
}

TEST(RoundedCapacity, FormulasAndErrors) {
  const auto capacity = [](RoundingPolicy policy) {
    return rounded_capacity(100, 6, 2, rounding(9, policy));
  };
  EXPECT_EQ(capacity(kDown), 200);
  EXPECT_EQ(capacity(kBalanced), 204);
  EXPECT_EQ(capacity(kNearest), 224);
  for (const RoundingPolicy policy : {kUp, kStochastic, kNearestScore}) {
    EXPECT_EQ(capacity(policy), 248);
  }
  EXPECT_EQ(rounded_capacity(8, 6, 2, rounding(8, kDown)), 16);
  error_of("tile", [] { rounded_capacity(8, 6, 2, rounding(9, kDown)); });
  error_of("tile", [] { rounded_capacity(8, 6, 2, rounding(0, kDown)); });
  error_of("tile", [] { rounded_capacity(0, 6, 2, rounding(1, kDown)); });
  error_of("num_experts", [] { rounded_capacity(8, 0, 1, rounding(1, kDown)); });
  error_of("top_k", [] { rounded_capacity(8, 6, 0, rounding(1, kDown)); });
  error_of("top_k", [] { rounded_capacity(8, 6, 7, rounding(1, kDown)); });
  error_of("num_tokens", [] { rounded_capacity(std::int64_t{1} << 31, 6, 1, rounding(1, kDown)); });
}

}  // namespace
}  // namespace sonicmoe::rig
