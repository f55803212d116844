// round_select, the selection inside token rounding, on every target: against the oracle, bit for
// bit, and against cases worked out by hand.
#include "ops/router_fixture.hpp"
#include "oracle/router.hpp"

namespace sonicmoe::rig {
namespace {

using enum RoundingPolicy;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class RoundSelect : public RouterTest {
 protected:
  RouterResult select(const Choice& choice, const RoundingOptions& options, int threads = 0) const {
    return run_round_select(target(), choice, options, threads);
  }
  void expect_definition(const Choice& choice, const RoundingOptions& options,
                         int threads = 3) const {
    SCOPED_TRACE("T=" + std::to_string(choice.num_tokens) + " E=" +
                 std::to_string(choice.num_experts) + " K=" + std::to_string(choice.top_k) + " " +
                 std::string(name_of(options.policy)) + " tile " + std::to_string(options.tile));
    EXPECT_THAT(
        differences(select(choice, options, threads), expected_round_select(choice, options)),
        IsEmpty());
  }
  // Rounded counts of experts that are chosen counts[e] times: K = 1, equal scores.
  Values rounded_counts(const RoundingOptions& options, const Ids& counts) const {
    Choice choice{0, static_cast<std::int64_t>(counts.size()), 1, {}, {}};
    for (std::size_t e = 0; e < counts.size(); ++e) {
      choice.ids.insert(choice.ids.end(), at(counts[e]), static_cast<double>(e));
    }
    choice.num_tokens = static_cast<std::int64_t>(choice.ids.size());
    choice.scores.assign(choice.ids.size() * counts.size(), 0.5);
    const RouterResult result = select(choice, options);
    EXPECT_EQ(result.rows_per_expert_before, Values(counts.begin(), counts.end()));
    return result.rows_per_expert;
  }
};
INSTANTIATE_TEST_SUITE_P(Targets, RoundSelect, ::testing::ValuesIn(targets()), target_name);

// Quarters of small integers: many ties. The ids are not the top-K of the scores: any are legal.
Choice random_choice(std::uint64_t seed) {
  Random random(seed);
  Choice choice{random.integer(1, 200), random.integer(1, 9), 1, {}, {}};
  choice.top_k = random.integer(1, choice.num_experts);
  for (std::int64_t i = 0; i < choice.num_tokens * choice.num_experts; ++i) {
    choice.scores.push_back(static_cast<double>(random.integer(seed % 3 == 0 ? -20 : 0, 20)) / 4.0);
  }
  for (std::int64_t t = 0; t < choice.num_tokens; ++t) {
    const std::int64_t first = random.chance(0.5) ? 0 : random.integer(0, choice.num_experts - 1);
    for (std::int64_t k = 0; k < choice.top_k; ++k) {
      choice.ids.push_back(static_cast<double>((first + k) % choice.num_experts));
    }
  }
  return choice;
}

struct Size {
  std::int64_t num_tokens, num_experts, top_k, tile;
  double skew = 2.0;
  bool ties = false;
  std::uint64_t seed = 1;

  // The scores' own top-K.
  Choice choice() const {
    Choice result{
        num_tokens, num_experts, top_k, make_logits(num_tokens, num_experts, skew, ties, seed), {}};
    RouterOptions options;
    options.top_k = top_k;
    const Ids ids = oracle::token_choice(options, result.scores, num_experts);
    result.ids.assign(ids.begin(), ids.end());
    return result;
  }
};

// Beyond 32768 tokens the CUDA kernel that selects reads part of a column again; beyond 24576 the
// one that counts does.
std::vector<Size> sizes() {
  std::vector<Size> result = {
      {1, 1, 1, 1},
      {5, 3, 2, 2},
      {31, 7, 3, 4},
      {32, 8, 2, 8},
      {33, 40, 4, 16},
      {700, 300, 5, 16},
      {1030, 12, 3, 128},
      {2500, 64, 8, 128},
      {2500, 64, 8, 100},
      {513, 6, 6, 128},
      {512, 1, 1, 512},
      {600, 24, 3, 64, 30.0},
      {4096, 10, 2, 256},
      {900, 1100, 4, 8},
      {1500, 20, 4, 32, 6.0},
      {5000, 5, 1, 1000},
      {1300, 600, 8, 16},
      {24576, 3, 1, 128},
      {32767, 3, 2, 128, 1.0},
      {40000, 2, 1, 64, 0.0},
      {54001, 3, 1, 128},
      {54001, 3, 2, 1000, 1.0, true},
  };
  Random random(7);
  for (std::uint64_t seed = 1; seed <= 12; ++seed) {
    const std::int64_t num_experts = random.integer(1, 80);
    result.push_back({random.integer(128, 1500), num_experts,
                      random.integer(1, std::min<std::int64_t>(num_experts, 8)),
                      random.integer(1, 128), 4.0 * random.uniform(), random.chance(0.5), seed});
  }
  return result;
}

TEST_P(RoundSelect, MatchesTheDefinition) {
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    const Choice choice = random_choice(seed);
    for (const RoundingPolicy policy : kPolicies) {
      for (const std::int64_t tile : {1, 2, 3, 8, 16, 64, 128}) {
        if (tile > choice.num_tokens) continue;
        expect_definition(choice, rounding(tile, policy, seed), seed % 8 == 0 ? 2 : 1);
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(RoundSelect, MatchesTheDefinitionAtManySizes) {
  for (const Size& size : sizes()) {
    const Choice choice = size.choice();
    for (const RoundingPolicy policy : kPolicies) {
      expect_definition(choice, rounding(size.tile, policy, 0x123456789abcdef0u + size.seed));
    }
  }
}

// All scores equal, of two values, negative, infinite, or zeros of either sign: cuts that end on
// one key, between two keys, or with every member. Column 0 is chosen by all tokens or by half of
// them.
TEST_P(RoundSelect, CutsAnyScores) {
  const std::vector<std::pair<double, double>> ranges = {
      {0.25, 0.25}, {-3.0, -3.0}, {-1.0, 1.0}, {-0.0, 0.0}, {-kInfinity, kInfinity}, {-9.0, -8.0}};
  for (const Size& size :
       {Size{33, 2, 1, 8}, Size{9001, 3, 1, 96}, Size{9001, 3, 3, 96}, Size{33001, 2, 1, 512}}) {
    for (const auto& [lowest, highest] : ranges) {
      for (const bool between : {false, true}) {  // the two values alone, or what lies between too
        if (between && !std::isfinite(highest)) continue;
        Random random(size.seed);
        Choice choice{size.num_tokens, size.num_experts, size.top_k, {}, {}};
        for (std::int64_t t = 0; t < size.num_tokens; ++t) {
          for (std::int64_t e = 0; e < size.num_experts; ++e) {
            const double share = random.uniform();
            const double value = between       ? lowest + (highest - lowest) * share
                                 : share < 0.5 ? lowest
                                               : highest;
            choice.scores.push_back(static_cast<float>(value));
          }
          const std::int64_t first = random.integer(0, 1);
          for (std::int64_t k = 0; k < size.top_k; ++k) {
            choice.ids.push_back(static_cast<double>((first + k) % size.num_experts));
          }
        }
        for (const RoundingPolicy policy : kPolicies) {
          expect_definition(choice, rounding(size.tile, policy));
        }
      }
    }
  }
}

// Scores of very different magnitudes: a sum in float or double would round, the decision of
// nearest_score must not.
TEST_P(RoundSelect, NearestScoreDecidesExactly) {
  Choice choice = Size{300, 16, 3, 16}.choice();
  Random random(11);
  for (double& score : choice.scores) {
    score = std::ldexp(1.0 + random.uniform(), static_cast<int>(random.integer(-140, 120)));
    score = static_cast<float>(random.chance(0.3) ? -score : score);
  }
  expect_definition(choice, rounding(16, kNearestScore));
}

TEST_P(RoundSelect, SeedTensorReplacesTheSeed) {
  const Choice choice = Size{500, 40, 4, 32, 1.0}.choice();
  const RoundingOptions options = rounding(32, kStochastic, 1);
  for (const std::int64_t seed : {std::int64_t{5}, std::int64_t{-1}, std::int64_t{1} << 40}) {
    const auto expected =
        expected_round_select(choice, rounding(32, kStochastic, static_cast<std::uint64_t>(seed)));
    EXPECT_THAT(differences(run_round_select(target(), choice, options, 0, seed), expected),
                IsEmpty());
    EXPECT_THAT(differences(select(choice, options), expected), ::testing::Not(IsEmpty()));
  }
}

// --------------------------------------------------------------------------------------- by hand

TEST_P(RoundSelect, PoliciesOnCounts) {
  const Ids counts{0, 1, 2, 3, 4, 5, 6, 7, 8, 20};
  EXPECT_THAT(rounded_counts(rounding(4, kUp), counts), ElementsAre(0, 4, 4, 4, 4, 8, 8, 8, 8, 20));
  EXPECT_THAT(rounded_counts(rounding(4, kDown), counts),
              ElementsAre(0, 0, 0, 0, 4, 4, 4, 4, 8, 20));
  // 2 is halfway between 0 and 4: 0 * 4 is even. 6 is halfway between 4 and 8: 2 * 4 is even.
  EXPECT_THAT(rounded_counts(rounding(4, kNearest), counts),
              ElementsAre(0, 0, 0, 4, 4, 4, 8, 8, 8, 20));
  // Carry: 1 -> 0 (-1), 1 -> 0 (-2), 1 -> 4 (+1), 1 -> 0 (0), 2 -> tie, nearest: 0 (-2), 2 -> 4
  // (0).
  EXPECT_THAT(rounded_counts(rounding(4, kBalanced), {1, 1, 1, 1, 2, 2, 6, 6}),
              ElementsAre(0, 0, 4, 0, 0, 4, 8, 4));
  EXPECT_EQ(rounded_counts(rounding(1, kStochastic, 3), counts),
            Values(counts.begin(), counts.end()));
}

TEST_P(RoundSelect, CeilingAboveTIsTheFloor) {
  for (const RoundingPolicy policy : kPolicies) {
    EXPECT_THAT(rounded_counts(rounding(4, policy), {7}), ElementsAre(4));
  }
  // T = 7: `balanced` may not take 8 for the 5, and carries -1 on to the next expert.
  EXPECT_THAT(rounded_counts(rounding(4, kBalanced), {7, 0}), ElementsAre(4, 0));
  EXPECT_THAT(rounded_counts(rounding(4, kBalanced), {5, 2}), ElementsAre(4, 4));
  EXPECT_THAT(rounded_counts(rounding(4, kNearest), {5, 2}), ElementsAre(4, 0));
}

TEST_P(RoundSelect, TiesGoToTheLowerToken) {
  // Expert 0: tokens 1, 3, 5 chose it. Down to 2 with equal scores keeps 1 and 3; up to 4 adds 0.
  const Choice choice{6, 2, 1, Values(12, 0.5), {1, 0, 1, 0, 1, 0}};
  const RouterResult down = select(choice, rounding(2, kDown));
  EXPECT_THAT(down.token_ids, ElementsAre(1, 3, 0, 2, -1, -1));
  EXPECT_THAT(down.expert_ids, ElementsAre(0, 0, 1, 1, -1, -1));
  EXPECT_THAT(select(choice, rounding(2, kUp)).token_ids, ElementsAre(0, 1, 3, 5, 0, 1, 2, 4));
}

TEST_P(RoundSelect, TokenChoiceRanksBeforeHigherScores) {
  // Token 0 chose expert 0 with the least score of all; tile 2 adds the best other, token 3.
  const Choice choice{4, 2, 1, {-1, 0, 0.25, 0, 0.5, 0, 0.75, 0}, {0, 1, 1, 1}};
  EXPECT_THAT(select(choice, rounding(2, kUp)).token_ids, ElementsAre(0, 3, 0, 1, 2, 3));
}

TEST_P(RoundSelect, NearestScoreByHand) {
  // Expert 0 of four tokens, three of which chose it; the weakest of them, and the fourth.
  const auto count = [&](double weakest, double other) {
    const Choice choice{4, 2, 1, {1, 0, 1, 0, weakest, 0, other, 0}, {0, 0, 0, 1}};
    return select(choice, rounding(2, kNearestScore)).rows_per_expert[0];
  };
  EXPECT_EQ(count(0.5, 0.25), 4);  // adding 0.25 changes less than dropping 0.5
  EXPECT_EQ(count(0.25, 0.5), 2);
  EXPECT_EQ(count(0.5, 0.5), 2);    // a tie goes down
  EXPECT_EQ(count(0.5, -0.25), 4);  // changes are compared in size
  EXPECT_EQ(count(0.5, -0.75), 2);
  EXPECT_EQ(count(0.5, -kInfinity), 2);
  EXPECT_EQ(count(std::nextafter(0.5f, 1.0f), 0.5), 4);
}

TEST_P(RoundSelect, StochasticRoundsUpAsOftenAsItShould) {
  int ups = 0;
  constexpr int kSeeds = 1000;
  for (int seed = 0; seed < kSeeds; ++seed) {
    ups +=
        rounded_counts(rounding(4, kStochastic, static_cast<std::uint64_t>(seed)), {1, 7})[0] == 4;
  }
  EXPECT_NEAR(ups, kSeeds / 4, 5 * std::sqrt(kSeeds * 0.25 * 0.75));
}

TEST_P(RoundSelect, ScoresAndIdsThatAreNone) {
  if (!on_cpu()) GTEST_SKIP() << "only the CPU looks at scores and ids";
  const Choice valid{4, 3, 2, Values(12, 0.5), {0, 1, 1, 2, 2, 0, 0, 2}};
  for (const double bad : {-1.0, 3.0, 2.0, 1e9}) {  // 2: twice in token 1
    Choice spoiled = valid;
    spoiled.ids[2] = bad == 2.0 ? spoiled.ids[3] : bad;
    EXPECT_THAT(error_of("topk_ids", [&] { select(spoiled, rounding(2, kNearest)); }),
                HasSubstr("token 1"));
  }
  Choice with_nan = valid;
  with_nan.scores[7] = kNaN;
  EXPECT_THAT(error_of("scores", [&] { select(with_nan, rounding(2, kNearest)); }),
              HasSubstr("token 2"));
}

}  // namespace
}  // namespace sonicmoe::rig
