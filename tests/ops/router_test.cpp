// Top-K routing and token rounding on every backend, compared with the host's on one thread. (What
// the host computes is compared with naive derivations in tests/unit/router_*_test.cpp; a CPU
// target runs on three threads here.) Selection is compared bit for bit.
#include <cmath>
#include <limits>

#include "ops/router_sides.hpp"

namespace sonicmoe::rig {
namespace {

class RouterOps : public ::testing::TestWithParam<Target> {};
INSTANTIATE_TEST_SUITE_P(Targets, RouterOps, ::testing::ValuesIn(targets()), target_name);

// ---------------------------------------------------------------------------------------- routing

struct RouteCase {
  std::int64_t num_tokens, num_experts, top_k;
  Scoring scoring;
  std::optional<bool> renormalize = {};
  bool bias = false;
  std::int64_t num_groups = 1, top_groups = 1;
  float scale = 1.0f;
  bool wide_ids = false;
  bool ties = false;

  std::string text() const {
    return "T=" + std::to_string(num_tokens) + " E=" + std::to_string(num_experts) +
           " K=" + std::to_string(top_k) + " " + std::string(name_of(scoring)) +
           " groups=" + std::to_string(num_groups) + (ties ? " ties" : "");
  }
};

std::vector<RouteCase> route_cases() {
  using enum Scoring;
  return {
      {1, 1, 1, kSoftmaxTopK},
      {3, 2, 2, kTopKSoftmax},
      {1000, 32, 4, kTopKSoftmax},
      {333, 33, 33, kTopKSoftmax, {}, false, 1, 1, 2.0f, true},
      {517, 64, 8, kSoftmaxTopK, {}, false, 1, 1, 1.0f, true},
      {517, 100, 8, kSoftmaxTopK, true},
      {300, 256, 8, kSigmoidTopK, {}, true, 8, 4, 2.5f},
      {300, 256, 8, kSigmoidTopK, false, true, 256, 20, 2.5f, true},
      {129, 300, 40, kSigmoidTopK, {}, true},
      {65, 512, 22, kSoftmaxTopK},
      {65, 1024, 33, kSoftmaxTopK, true},
      {40, 1025, 10, kTopKSoftmax},
      {40, 1536, 10, kSigmoidTopK, {}, true, 6, 2},
      {2000, 128, 8, kTopKSoftmax},
      {1000, 512, 10, kTopKSoftmax},
      {400, 48, 6, kTopKSoftmax, {}, false, 1, 1, 1.0f, false, true},
      {400, 512, 10, kTopKSoftmax, {}, false, 1, 1, 1.0f, false, true},
      {200, 700, 32, kSoftmaxTopK, {}, false, 1, 1, 1.0f, true, true},
      {400, 48, 6, kSigmoidTopK, {}, false, 4, 2, 1.0f, false, true},
  };
}

struct Routed {
  Values ids, weights, rows, grad;
};

RouterOptions options_of(const RouteCase& c, const Tensor& bias) {
  RouterOptions options;
  options.top_k = c.top_k;
  options.scoring = c.scoring;
  options.renormalize = c.renormalize;
  options.selection_bias = bias.view();
  options.num_groups = c.num_groups;
  options.top_groups = c.top_groups;
  options.scale = c.scale;
  return options;
}

Routed route(const Side& side, const RouteCase& c) {
  const Tensor logits = side.floats({c.num_tokens, c.num_experts},
                                    make_logits(c.num_tokens, c.num_experts, 1.0, c.ties, 1));
  Tensor bias;
  if (c.bias) bias = side.floats({c.num_experts}, make_logits(1, c.num_experts, 0.0, false, 2));
  const RouterOptions options = options_of(c, bias);
  const std::vector<std::int64_t> shape = {c.num_tokens, c.top_k};
  const Tensor ids = side.output(c.wide_ids ? DType::kInt64 : DType::kInt32, shape);
  const Tensor weights = side.output(DType::kFloat32, shape);
  const Tensor rows = side.output(DType::kInt32, {c.num_experts});
  route_forward(side.context, {options, logits.view(), ids.view(), weights.view(), rows.view()});

  const Tensor grad_weights = side.floats(shape, make_logits(c.num_tokens, c.top_k, 0.0, false, 3));
  const Tensor grad = side.output(DType::kFloat32, {c.num_tokens, c.num_experts});
  route_backward(side.context,
                 {options, logits.view(), ids.view(), grad_weights.view(), grad.view()});
  for (const Tensor* output : {&ids, &weights, &rows, &grad}) expect_output(*output);
  EXPECT_EQ(logits.violation_as_input(), "");
  return {ids.values(), weights.values(), rows.values(), grad.values()};
}

TEST_P(RouterOps, RouteAgreesWithTheHost) {
  for (const RouteCase& c : route_cases()) {
    SCOPED_TRACE(c.text());
    const Routed expected = route(Side::host(), c);
    const Routed actual = route(Side::device(GetParam()), c);
    EXPECT_EQ(actual.ids, expected.ids);
    EXPECT_EQ(actual.rows, expected.rows);
    expect_close(actual.weights, expected.weights, kOneRounding);
    if (c.num_experts > 1) expect_close(actual.grad, expected.grad, kOneRounding);
  }
}

TEST_P(RouterOps, RouteTwiceGivesTheSameBits) {
  const RouteCase c{2000, 128, 8, Scoring::kSigmoidTopK, {}, false, 8, 4};
  const Routed first = route(Side::device(GetParam()), c);
  const Routed second = route(Side::device(GetParam()), c);
  EXPECT_EQ(first.weights, second.weights);
  EXPECT_EQ(first.grad, second.grad);
}

TEST_P(RouterOps, ANaNNeverGivesAnIdOutOfRange) {
  if (GetParam().device.type == DeviceType::kCpu) GTEST_SKIP() << "the CPU refuses a NaN";
  const std::int64_t num_experts = 40, top_k = 4;
  const Side side = Side::device(GetParam());
  for (const Scoring scoring :
       {Scoring::kTopKSoftmax, Scoring::kSoftmaxTopK, Scoring::kSigmoidTopK}) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    Values values(static_cast<std::size_t>(3 * num_experts), nan);  // token 0: nothing else
    for (std::size_t i = 1; i < values.size(); i += 3) values[i] = 1.0;
    RouterOptions options;
    options.top_k = top_k;
    options.scoring = scoring;
    const Tensor logits = side.floats({3, num_experts}, values);
    const Tensor ids = side.output(DType::kInt32, {3, top_k});
    const Tensor weights = side.output(DType::kFloat32, {3, top_k});
    route_forward(side.context, {options, logits.view(), ids.view(), weights.view(), {}});
    for (const double id : ids.values()) {
      EXPECT_GE(id, 0);
      EXPECT_LT(id, num_experts);
    }
  }
}

// --------------------------------------------------------------------------------- token rounding

struct RoundCase {
  std::int64_t num_tokens, num_experts, top_k, tile;
  double skew = 2.0;
  bool ties = false;
  std::uint64_t seed = 1;

  std::string text() const {
    return "T=" + std::to_string(num_tokens) + " E=" + std::to_string(num_experts) +
           " K=" + std::to_string(top_k) + " M=" + std::to_string(tile) +
           " skew=" + std::to_string(skew) + (ties ? " ties" : "") +
           " seed=" + std::to_string(seed);
  }
};

// Beyond 32768 tokens the CUDA kernel that selects reads part of a column again; beyond 24576 the
// one that counts does.
std::vector<RoundCase> round_cases() {
  std::vector<RoundCase> cases = {
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
    cases.push_back({random.integer(128, 1500), num_experts,
                     random.integer(1, std::min<std::int64_t>(num_experts, 8)),
                     random.integer(1, 128), 4.0 * random.uniform(), random.chance(0.5), seed});
  }
  return cases;
}

const std::vector<RoundingPolicy>& policies() {
  using enum RoundingPolicy;
  static const std::vector<RoundingPolicy> all = {kNearest,    kUp,       kDown,
                                                  kStochastic, kBalanced, kNearestScore};
  return all;
}

// The first K of every token's descending scores: what round_select takes beside the scores.
Values top_ids(const Values& scores, const RoundCase& c) {
  Values ids;
  for (std::int64_t t = 0; t < c.num_tokens; ++t) {
    std::vector<std::int64_t> order(static_cast<std::size_t>(c.num_experts));
    for (std::size_t e = 0; e < order.size(); ++e) order[e] = static_cast<std::int64_t>(e);
    const double* row = scores.data() + t * c.num_experts;
    std::stable_sort(order.begin(), order.end(),
                     [&](std::int64_t a, std::int64_t b) { return row[a] > row[b]; });
    for (std::int64_t k = 0; k < c.top_k; ++k) {
      ids.push_back(static_cast<double>(order[static_cast<std::size_t>(k)]));
    }
  }
  return ids;
}

struct Selected {
  Values tokens, experts, rows, before;
  bool operator==(const Selected&) const = default;
};

Selected select(const Side& side, const RoundCase& c, const RoundingOptions& rounding,
                const Values& scores, const Values& ids) {
  const Tensor score_tensor = side.floats({c.num_tokens, c.num_experts}, scores);
  const Tensor id_tensor = side.ids(DType::kInt32, {c.num_tokens, c.top_k}, ids);
  const std::int64_t capacity = rounded_capacity(c.num_tokens, c.num_experts, c.top_k, rounding);
  const Tensor tokens = side.output(DType::kInt32, {capacity});
  const Tensor experts = side.output(DType::kInt32, {capacity});
  const Tensor rows = side.output(DType::kInt32, {c.num_experts});
  const Tensor before = side.output(DType::kInt32, {c.num_experts});
  const GuardedBuffer workspace(
      side.target,
      round_tokens_workspace_bytes(side.context, c.num_tokens, c.num_experts, c.top_k));
  round_select(side.context, {rounding, score_tensor.view(), id_tensor.view(), tokens.view(),
                              experts.view(), rows.view(), before.view(), workspace.view()});
  for (const Tensor* output : {&tokens, &experts, &rows, &before}) expect_output(*output);
  EXPECT_TRUE(workspace.guards_intact());
  return {tokens.values(), experts.values(), rows.values(), before.values()};
}

TEST_P(RouterOps, RoundSelectGivesTheHostsBits) {
  for (const RoundCase& c : round_cases()) {
    const Values scores = make_logits(c.num_tokens, c.num_experts, c.skew, c.ties, c.seed);
    const Values ids = top_ids(scores, c);
    for (const RoundingPolicy policy : policies()) {
      SCOPED_TRACE(c.text() + " " + std::string(name_of(policy)));
      RoundingOptions rounding;
      rounding.tile = c.tile;
      rounding.policy = policy;
      rounding.seed = 0x123456789abcdef0u + c.seed;
      const Selected expected = select(Side::host(), c, rounding, scores, ids);
      EXPECT_TRUE(select(Side::device(GetParam()), c, rounding, scores, ids) == expected);
    }
  }
}

// All scores equal, of two values, negative, infinite, or zeros of either sign: cuts that end on
// one key, between two keys, or with every member. Column 0 is chosen by all tokens or by half of
// them.
TEST_P(RouterOps, RoundSelectCutsAnyScores) {
  const double infinity = std::numeric_limits<double>::infinity();
  const std::vector<std::pair<double, double>> ranges = {
      {0.25, 0.25}, {-3.0, -3.0}, {-1.0, 1.0}, {-0.0, 0.0}, {-infinity, infinity}, {-9.0, -8.0}};
  for (const RoundCase& c : {RoundCase{33, 2, 1, 8}, RoundCase{9001, 3, 1, 96},
                             RoundCase{9001, 3, 3, 96}, RoundCase{33001, 2, 1, 512}}) {
    for (const auto& [lowest, highest] : ranges) {
      for (const bool between : {false, true}) {  // the two values alone, or what lies between too
        if (between && !std::isfinite(highest)) continue;
        Random random(c.seed);
        Values scores, ids;
        for (std::int64_t t = 0; t < c.num_tokens; ++t) {
          for (std::int64_t e = 0; e < c.num_experts; ++e) {
            const double share = random.uniform();
            const double value = between       ? lowest + (highest - lowest) * share
                                 : share < 0.5 ? lowest
                                               : highest;
            scores.push_back(static_cast<float>(value));
          }
          const std::int64_t first = random.integer(0, 1);
          for (std::int64_t k = 0; k < c.top_k; ++k) {
            ids.push_back(static_cast<double>((first + k) % c.num_experts));
          }
        }
        for (const RoundingPolicy policy : policies()) {
          SCOPED_TRACE(c.text() + " " + std::string(name_of(policy)) + " scores " +
                       std::to_string(lowest) + " to " + std::to_string(highest) +
                       (between ? " and between" : ""));
          RoundingOptions rounding;
          rounding.tile = c.tile;
          rounding.policy = policy;
          const Selected expected = select(Side::host(), c, rounding, scores, ids);
          EXPECT_TRUE(select(Side::device(GetParam()), c, rounding, scores, ids) == expected);
        }
      }
    }
  }
}

// Scores of very different magnitudes: a sum in float or double would round, the decision of
// nearest_score must not.
TEST_P(RouterOps, NearestScoreDecidesExactly) {
  const RoundCase c{300, 16, 3, 16};
  Random random(11);
  Values scores;
  for (std::int64_t i = 0; i < c.num_tokens * c.num_experts; ++i) {
    const double magnitude =
        std::ldexp(1.0 + random.uniform(), static_cast<int>(random.integer(-140, 120)));
    scores.push_back(static_cast<float>(random.chance(0.3) ? -magnitude : magnitude));
  }
  const Values ids = top_ids(scores, c);
  RoundingOptions rounding;
  rounding.tile = c.tile;
  rounding.policy = RoundingPolicy::kNearestScore;
  const Selected expected = select(Side::host(), c, rounding, scores, ids);
  EXPECT_TRUE(select(Side::device(GetParam()), c, rounding, scores, ids) == expected);
}

TEST_P(RouterOps, SeedTensorReplacesTheSeed) {
  const RoundCase c{500, 40, 4, 32};
  const Values scores = make_logits(c.num_tokens, c.num_experts, 1.0, false, 5);
  const Values ids = top_ids(scores, c);
  RoundingOptions rounding;
  rounding.tile = c.tile;
  rounding.policy = RoundingPolicy::kStochastic;
  rounding.seed = 1;
  const Selected other = select(Side::host(), c, rounding, scores, ids);
  rounding.seed = 987654321;
  const Selected expected = select(Side::host(), c, rounding, scores, ids);
  ASSERT_FALSE(other == expected);
  const Side side = Side::device(GetParam());
  const Tensor seed = side.ids(DType::kInt64, {1}, {987654321});
  rounding.seed = 1;
  rounding.seed_tensor = seed.view();
  EXPECT_TRUE(select(side, c, rounding, scores, ids) == expected);
}

struct Rounded {
  Values ids, tokens, experts, weights, rows, before, grad;
};

Rounded round(const Side& side, const RoundCase& c, const RouteCase& router,
              RoundingPolicy policy) {
  const Tensor logits =
      side.floats({c.num_tokens, c.num_experts},
                  make_logits(c.num_tokens, c.num_experts, c.skew, false, c.seed));
  Tensor bias;
  if (router.bias) bias = side.floats({c.num_experts}, make_logits(1, c.num_experts, 0, false, 2));
  RoundTokensForwardArgs args;
  args.options = options_of(router, bias);
  args.rounding.tile = c.tile;
  args.rounding.policy = policy;
  args.rounding.seed = 3;
  const std::int64_t capacity =
      rounded_capacity(c.num_tokens, c.num_experts, c.top_k, args.rounding);
  const Tensor tokens = side.output(DType::kInt32, {capacity});
  const Tensor experts = side.output(DType::kInt32, {capacity});
  const Tensor weights = side.output(DType::kFloat32, {capacity});
  const Tensor ids = side.output(DType::kInt32, {c.num_tokens, c.top_k});
  const Tensor rows = side.output(DType::kInt32, {c.num_experts});
  const Tensor before = side.output(DType::kInt32, {c.num_experts});
  const GuardedBuffer workspace(
      side.target,
      round_tokens_workspace_bytes(side.context, c.num_tokens, c.num_experts, c.top_k));
  args.logits = logits.view();
  args.token_ids = tokens.view();
  args.expert_ids = experts.view();
  args.pair_weights = weights.view();
  args.topk_ids = ids.view();
  args.rows_per_expert = rows.view();
  args.rows_per_expert_before = before.view();
  args.workspace = workspace.view();
  round_tokens_forward(side.context, args);

  const Tensor grad_weights = side.floats({capacity}, make_logits(1, capacity, 0.0, false, 9));
  const Tensor grad = side.output(DType::kFloat32, {c.num_tokens, c.num_experts});
  round_tokens_backward(side.context, {args.options, logits.view(), ids.view(), tokens.view(),
                                       experts.view(), grad_weights.view(), grad.view()});
  for (const Tensor* output : {&tokens, &experts, &weights, &ids, &rows, &before, &grad}) {
    expect_output(*output);
  }
  EXPECT_TRUE(workspace.guards_intact());
  return {ids.values(),  tokens.values(), experts.values(), weights.values(),
          rows.values(), before.values(), grad.values()};
}

TEST_P(RouterOps, RoundTokensAgreesWithTheHost) {
  using enum Scoring;
  const std::vector<RouteCase> routers = {
      {1000, 48, 4, kTopKSoftmax, {}, false, 1, 1, 2.0f},
      {1000, 48, 4, kSoftmaxTopK},
      {1000, 48, 4, kSoftmaxTopK, true},
      {1000, 48, 4, kSigmoidTopK, {}, true, 4, 2, 2.5f},
      {1000, 48, 4, kSigmoidTopK, false},
      {333, 600, 4, kTopKSoftmax},
      {333, 600, 40, kTopKSoftmax},
      {333, 300, 4, kSoftmaxTopK, false},
      {333, 600, 4, kSigmoidTopK, {}, true},
  };
  for (const RouteCase& router : routers) {
    const std::int64_t tile = router.num_experts > 100 ? 4 : 32;
    const RoundCase c{router.num_tokens, router.num_experts, router.top_k, tile};
    for (const RoundingPolicy policy : policies()) {
      SCOPED_TRACE(router.text() + " " + std::string(name_of(policy)));
      const Rounded expected = round(Side::host(), c, router, policy);
      const Rounded actual = round(Side::device(GetParam()), c, router, policy);
      EXPECT_EQ(actual.ids, expected.ids);
      EXPECT_EQ(actual.tokens, expected.tokens);
      EXPECT_EQ(actual.experts, expected.experts);
      EXPECT_EQ(actual.rows, expected.rows);
      EXPECT_EQ(actual.before, expected.before);
      expect_close(actual.weights, expected.weights, kOneRounding);
      expect_close(actual.grad, expected.grad, kOneRounding);
    }
  }
}

}  // namespace
}  // namespace sonicmoe::rig
