// round_select against the naive derivation, and cases by hand.
#include "router_rounding_support.hpp"

namespace sonicmoe::router_test {
namespace {

struct RandomSelection {
  std::int64_t num_tokens, num_experts, top_k;
  std::vector<float> scores;      // quarters of small integers: many ties, exact sums
  std::vector<std::int32_t> ids;  // not the top-K of the scores: any ids are legal

  explicit RandomSelection(std::uint64_t seed) {
    std::mt19937_64 generator(seed);
    const auto draw = [&](std::int64_t low, std::int64_t high) {
      return low +
             static_cast<std::int64_t>(generator() % static_cast<std::uint64_t>(high - low + 1));
    };
    num_tokens = draw(1, 200);
    num_experts = draw(1, 9);
    top_k = draw(1, num_experts);
    for (std::int64_t i = 0; i < num_tokens * num_experts; ++i) {
      scores.push_back(static_cast<float>(draw(seed % 3 == 0 ? -20 : 0, 20)) / 4);
    }
    std::vector<std::int32_t> order(at(num_experts));
    std::iota(order.begin(), order.end(), 0);
    for (std::int64_t t = 0; t < num_tokens; ++t) {
      std::shuffle(order.begin(), order.end(), generator);
      if (seed % 2 == 0) std::partial_sort(order.begin(), order.begin() + 1, order.end());
      ids.insert(ids.end(), order.begin(), order.begin() + top_k);
    }
  }
};

TEST(RoundSelect, MatchesTheNaiveDerivation) {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    const RandomSelection r(seed);
    for (const RoundingPolicy policy : kPolicies) {
      for (const std::int64_t tile : {1, 2, 3, 8, 16, 64, 128}) {
        if (tile > r.num_tokens) continue;
        SCOPED_TRACE(std::string(name_of(policy)) + ", tile " + std::to_string(tile) + ", seed " +
                     std::to_string(seed));
        const RoundingOptions options = rounding(tile, policy, seed);
        Selected selected(options, r.num_tokens, r.num_experts, r.top_k, r.scores, r.ids);
        selected.run(seed % 8 == 0 ? 2 : 1);
        selected.expect(naive_rounding(options, r.num_tokens, r.num_experts, r.scores, r.ids));
        if (::testing::Test::HasFailure()) return;
      }
    }
  }
}

// Counts per expert through ids alone: T tokens, K = 1, expert e gets counts[e].
std::vector<std::int32_t> rounded_counts(const RoundingOptions& options,
                                         const std::vector<std::int64_t>& counts) {
  std::vector<std::int32_t> ids;
  for (std::size_t e = 0; e < counts.size(); ++e) {
    ids.insert(ids.end(), at(counts[e]), static_cast<std::int32_t>(e));
  }
  const auto tokens = static_cast<std::int64_t>(ids.size());
  const auto experts = static_cast<std::int64_t>(counts.size());
  const std::vector<float> scores(ids.size() * counts.size(), 0.5f);
  Selected selected(options, tokens, experts, 1, scores, ids);
  selected.run();
  EXPECT_EQ(selected.before.values(), std::vector<std::int32_t>(counts.begin(), counts.end()));
  return selected.after.values();
}

TEST(RoundSelectByHand, PoliciesOnCounts) {
  const std::vector<std::int64_t> counts{0, 1, 2, 3, 4, 5, 6, 7, 8, 20};
  EXPECT_THAT(rounded_counts(rounding(4, kUp), counts),
              ::testing::ElementsAre(0, 4, 4, 4, 4, 8, 8, 8, 8, 20));
  EXPECT_THAT(rounded_counts(rounding(4, kDown), counts),
              ::testing::ElementsAre(0, 0, 0, 0, 4, 4, 4, 4, 8, 20));
  // 2 is halfway between 0 and 4: 0 * 4 is even. 6 is halfway between 4 and 8: 2 * 4 is even.
  EXPECT_THAT(rounded_counts(rounding(4, kNearest), counts),
              ::testing::ElementsAre(0, 0, 0, 4, 4, 4, 8, 8, 8, 20));
  // Carry: 1 -> 0 (-1), 1 -> 0 (-2), 1 -> 4 (+1), 1 -> 0 (0), 2 -> tie, nearest: 0 (-2), 2 -> 4
  // (0).
  EXPECT_THAT(rounded_counts(rounding(4, kBalanced), {1, 1, 1, 1, 2, 2, 6, 6}),
              ::testing::ElementsAre(0, 0, 4, 0, 0, 4, 8, 4));
  EXPECT_THAT(rounded_counts(rounding(1, kStochastic, 3), counts),
              ::testing::ElementsAreArray(counts));
}

TEST(RoundSelectByHand, CeilingAboveTIsTheFloor) {
  for (const RoundingPolicy policy : kPolicies) {
    EXPECT_THAT(rounded_counts(rounding(4, policy), {7}), ::testing::ElementsAre(4));
  }
  // T = 7: `balanced` may not take 8 for the 5, and carries -1 on to the next expert.
  EXPECT_THAT(rounded_counts(rounding(4, kBalanced), {7, 0}), ::testing::ElementsAre(4, 0));
  EXPECT_THAT(rounded_counts(rounding(4, kBalanced), {5, 2}), ::testing::ElementsAre(4, 4));
  EXPECT_THAT(rounded_counts(rounding(4, kNearest), {5, 2}), ::testing::ElementsAre(4, 0));
}

TEST(RoundSelectByHand, TiesGoToTheLowerToken) {
  // Expert 0: tokens 1, 3, 5 chose it. Down to 2 with equal scores keeps 1 and 3; up to 4 adds 0.
  const std::vector<std::int32_t> ids{1, 0, 1, 0, 1, 0};
  const std::vector<float> scores(12, 0.5f);
  Selected down(rounding(2, kDown), 6, 2, 1, scores, ids);
  down.run();
  EXPECT_THAT(down.tokens.values(), ::testing::ElementsAre(1, 3, 0, 2, -1, -1));
  EXPECT_THAT(down.experts.values(), ::testing::ElementsAre(0, 0, 1, 1, -1, -1));
  Selected up(rounding(2, kUp), 6, 2, 1, scores, ids);
  up.run();
  EXPECT_THAT(up.tokens.values(), ::testing::ElementsAre(0, 1, 3, 5, 0, 1, 2, 4));
}

TEST(RoundSelectByHand, TokenChoiceRanksBeforeHigherScores) {
  // Token 0 chose expert 0 with the least score of all; tile 2 adds the best other, token 3.
  const std::vector<float> scores{-1, 0, 0.25f, 0, 0.5f, 0, 0.75f, 0};
  Selected up(rounding(2, kUp), 4, 2, 1, scores, {0, 1, 1, 1});
  up.run();
  EXPECT_THAT(up.tokens.values(), ::testing::ElementsAre(0, 3, 0, 1, 2, 3));
}

// Expert 0 of four tokens, three chose it with scores s0 >= s1 >= s2; token 3's score is `other`.
std::int32_t nearest_score_count(float weakest, float other) {
  Selected selected(rounding(2, kNearestScore), 4, 2, 1, {1.0f, 0, 1.0f, 0, weakest, 0, other, 0},
                    {0, 0, 0, 1});
  selected.run();
  return selected.after.values()[0];
}

TEST(RoundSelectByHand, NearestScore) {
  EXPECT_EQ(nearest_score_count(0.5f, 0.25f), 4);  // adding 0.25 changes less than dropping 0.5
  EXPECT_EQ(nearest_score_count(0.25f, 0.5f), 2);
  EXPECT_EQ(nearest_score_count(0.5f, 0.5f), 2);    // a tie goes down
  EXPECT_EQ(nearest_score_count(0.5f, -0.25f), 4);  // changes are compared in size
  EXPECT_EQ(nearest_score_count(0.5f, -0.75f), 2);
  EXPECT_EQ(nearest_score_count(0.5f, -kInf), 2);
  EXPECT_EQ(nearest_score_count(std::nextafter(0.5f, 1.0f), 0.5f), 4);
}

TEST(RoundSelect, StochasticRoundsUpAsOftenAsItShould) {
  int ups = 0;
  constexpr int kSeeds = 1000;
  for (int seed = 0; seed < kSeeds; ++seed) {
    ups +=
        rounded_counts(rounding(4, kStochastic, static_cast<std::uint64_t>(seed)), {1, 7})[0] == 4;
  }
  EXPECT_NEAR(ups, kSeeds / 4, 5 * std::sqrt(kSeeds * 0.25 * 0.75));
}

TEST(RoundSelect, SeedTensorReplacesTheSeed) {
  const RandomSelection r(11);
  for (const std::int64_t seed : {std::int64_t{5}, std::int64_t{-1}, std::int64_t{1} << 40}) {
    const auto unsigned_seed = static_cast<std::uint64_t>(seed);
    const Buffer<std::int64_t> tensor({seed}, {1});
    RoundingOptions options = rounding(std::min<std::int64_t>(7, r.num_tokens), kStochastic, 99);
    options.seed_tensor = tensor.view();
    Selected from_tensor(options, r.num_tokens, r.num_experts, r.top_k, r.scores, r.ids);
    from_tensor.run();
    from_tensor.expect(naive_rounding(rounding(options.tile, kStochastic, unsigned_seed),
                                      r.num_tokens, r.num_experts, r.scores, r.ids));
  }
}

// ------------------------------------------------------------------------------------------ errors

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

TEST(RoundSelectErrors, ScoresAndIds) {
  if (!on_cpu()) GTEST_SKIP() << "only the CPU looks at scores and ids";
  const std::vector<float> scores(12, 0.5f);
  const std::vector<std::int32_t> ids{0, 1, 1, 2, 2, 0, 0, 2};
  for (const std::int32_t bad : {-1, 3, 2, 1 << 30}) {  // 2: twice in token 1
    std::vector<std::int32_t> spoiled = ids;
    spoiled[2] = bad;
    Selected selected(rounding(2, kNearest), 4, 3, 2, scores, spoiled);
    EXPECT_THAT(error_of("topk_ids", [&] { selected.run(); }), ::testing::HasSubstr("token 1"));
  }
  std::vector<float> with_nan = scores;
  with_nan[7] = kNaN;
  Selected selected(rounding(2, kNearest), 4, 3, 2, with_nan, ids);
  EXPECT_THAT(error_of("scores", [&] { selected.run(); }), ::testing::HasSubstr("token 2"));
}

}  // namespace
}  // namespace sonicmoe::router_test
