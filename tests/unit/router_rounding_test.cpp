// Token rounding against a naive derivation with full sorts, its guarantees, and cases by hand.
#include "router/philox.hpp"
#include "router_test_support.hpp"

namespace sonicmoe::router_test {
namespace {

using enum RoundingPolicy;
constexpr RoundingPolicy kPolicies[] = {kNearest,    kUp,       kDown,
                                        kStochastic, kBalanced, kNearestScore};

RoundingOptions rounding(std::int64_t tile, RoundingPolicy policy, std::uint64_t seed = 0) {
  RoundingOptions options;
  options.tile = tile;
  options.policy = policy;
  options.seed = seed;
  return options;
}

std::int64_t workspace_bytes(std::int64_t num_tokens, std::int64_t num_experts,
                             std::int64_t top_k) {
  return static_cast<std::int64_t>(
      round_tokens_workspace_bytes(context(), num_tokens, num_experts, top_k));
}

// ---------------------------------------------------------------------- the naive derivation

struct Selection {
  std::vector<std::int32_t> tokens, experts;  // without unused places
  std::vector<std::int32_t> before, after;    // [E]
};

std::int64_t nearest_multiple(std::int64_t f, std::int64_t tile) {
  const std::int64_t low = f / tile * tile;
  const std::int64_t high = f == low ? low : low + tile;
  if (f - low != high - f) return f - low < high - f ? low : high;
  return low / tile % 2 == 0 ? low : high;
}

/// `scores` [T, E], `ids` [T, K].
Selection naive_rounding(const RoundingOptions& options, std::int64_t num_tokens,
                         std::int64_t num_experts, const std::vector<float>& scores,
                         const std::vector<std::int32_t>& ids) {
  Selection result;
  const std::int64_t top_k = static_cast<std::int64_t>(ids.size()) / num_tokens;
  const std::int64_t tile = options.tile;
  std::int64_t carry = 0;
  for (std::int64_t e = 0; e < num_experts; ++e) {
    std::vector<bool> chose(at(num_tokens));
    for (std::size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] == e) chose[i / at(top_k)] = true;
    }
    const auto score = [&](std::int64_t t) { return scores[at(t * num_experts + e)]; };
    std::vector<std::int64_t> ranking(at(num_tokens));
    std::iota(ranking.begin(), ranking.end(), 0);
    std::stable_sort(ranking.begin(), ranking.end(), [&](std::int64_t a, std::int64_t b) {
      if (chose[at(a)] != chose[at(b)]) return bool{chose[at(a)]};
      return score(a) > score(b);
    });
    const std::int64_t f = std::count(chose.begin(), chose.end(), true);
    const std::int64_t low = f / tile * tile;
    const std::int64_t high = (f + tile - 1) / tile * tile;
    std::int64_t rounded = low;
    if (high <= num_tokens && high != low) {
      // Quarters in these tests: double sums are exact.
      double dropped = 0.0;
      double added = 0.0;
      for (std::int64_t i = low; i < f; ++i) dropped += double{score(ranking[at(i)])};
      for (std::int64_t i = f; i < high; ++i) added += double{score(ranking[at(i)])};
      const double draw = rounding_bits(options.seed, static_cast<std::uint32_t>(e)) / 4294967296.0;
      const std::int64_t size_down = std::abs(carry + low - f);
      const std::int64_t size_up = std::abs(carry + high - f);
      switch (options.policy) {
        case kNearest:
          rounded = nearest_multiple(f, tile);
          break;
        case kUp:
          rounded = high;
          break;
        case kDown:
          rounded = low;
          break;
        case kStochastic:
          rounded = draw < static_cast<double>(f - low) / static_cast<double>(tile) ? high : low;
          break;
        case kBalanced:
          rounded = size_down == size_up  ? nearest_multiple(f, tile)
                    : size_up < size_down ? high
                                          : low;
          break;
        case kNearestScore:
          rounded = std::abs(added) < std::abs(dropped) ? high : low;
          break;
      }
    }
    carry += rounded - f;
    result.before.push_back(static_cast<std::int32_t>(f));
    result.after.push_back(static_cast<std::int32_t>(rounded));
    std::vector<std::int64_t> kept(ranking.begin(), ranking.begin() + rounded);
    std::sort(kept.begin(), kept.end());
    for (const std::int64_t t : kept) {
      result.tokens.push_back(static_cast<std::int32_t>(t));
      result.experts.push_back(static_cast<std::int32_t>(e));
    }
  }
  return result;
}

template <class T>
std::vector<T> padded(std::vector<T> values, std::int64_t length, T filler) {
  EXPECT_LE(values.size(), at(length));
  values.resize(at(length), filler);
  return values;
}

// -------------------------------------------------------------------------- calls of the library

struct Selected {
  std::int64_t capacity;
  Buffer<float> scores;
  Buffer<std::int32_t> ids, tokens, experts, after, before;
  Buffer<std::uint8_t> workspace;
  RoundSelectArgs args;

  Selected(const RoundingOptions& options, std::int64_t num_tokens, std::int64_t num_experts,
           std::int64_t top_k, const std::vector<float>& given_scores,
           const std::vector<std::int32_t>& given_ids)
      : capacity(rounded_capacity(num_tokens, num_experts, top_k, options)),
        scores(given_scores, {num_tokens, num_experts}),
        ids(given_ids, {num_tokens, top_k}),
        tokens({capacity}),
        experts({capacity}),
        after({num_experts}),
        before({num_experts}),
        workspace({workspace_bytes(num_tokens, num_experts, top_k)}) {
    args.rounding = options;
    args.scores = scores.view();
    args.topk_ids = ids.view();
    args.token_ids = tokens.view();
    args.expert_ids = experts.view();
    args.rows_per_expert = after.view();
    args.rows_per_expert_before = before.view();
    args.workspace = workspace.view();
  }
  void run(int threads = 2) { round_select(context(threads), args); }
  void expect(const Selection& expected) {
    EXPECT_EQ(before.values(), expected.before);
    EXPECT_EQ(after.values(), expected.after);
    EXPECT_EQ(tokens.values(), padded(expected.tokens, capacity, -1));
    EXPECT_EQ(experts.values(), padded(expected.experts, capacity, -1));
  }
};

struct Rounded {
  Inputs inputs;
  std::int64_t capacity;
  Buffer<std::int32_t> tokens, experts, ids, after, before;
  Buffer<float> weights;
  Buffer<std::uint8_t> workspace;
  RoundTokensForwardArgs args;

  Rounded(const Problem& p, const RoundingOptions& options)
      : inputs(p),
        capacity(rounded_capacity(p.num_tokens, p.num_experts, p.options.top_k, options)),
        tokens({capacity}),
        experts({capacity}),
        ids({p.num_tokens, p.options.top_k}),
        after({p.num_experts}),
        before({p.num_experts}),
        weights({capacity}),
        workspace({workspace_bytes(p.num_tokens, p.num_experts, p.options.top_k)}) {
    args.options = inputs.options;
    args.rounding = options;
    args.logits = inputs.logits.view();
    args.token_ids = tokens.view();
    args.expert_ids = experts.view();
    args.pair_weights = weights.view();
    args.topk_ids = ids.view();
    args.rows_per_expert = after.view();
    args.rows_per_expert_before = before.view();
    args.workspace = workspace.view();
  }
  void run(int threads = 2) { round_tokens_forward(context(threads), args); }
  std::vector<float> backward(const std::vector<float>& grad_weights, int threads = 2) {
    const Buffer<float> grad(grad_weights, {capacity});
    const Buffer<float> grad_logits({args.logits.size(0), args.logits.size(1)});
    RoundTokensBackwardArgs back;
    back.options = inputs.options;
    back.logits = inputs.logits.view();
    back.topk_ids = ids.view();
    back.token_ids = tokens.view();
    back.expert_ids = experts.view();
    back.grad_pair_weights = grad.view();
    back.grad_logits = grad_logits.view();
    round_tokens_backward(context(threads), back);
    return grad_logits.values();
  }
};

// ---------------------------------------------------------------------------- round_select

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

// ------------------------------------------------------------------- round_tokens, by
// configuration

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
