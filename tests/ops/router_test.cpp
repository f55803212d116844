// The router's operations on every backend, compared with the host's on one thread. (What the host
// computes is compared with naive derivations in tests/unit/router_*_test.cpp; a CPU target runs on
// three threads here.) Selection is compared bit for bit.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "core/backend.hpp"
#include "sonicmoe/sonicmoe.hpp"
#include "support/random.hpp"
#include "support/target.hpp"
#include "support/tensor.hpp"

namespace sonicmoe::testing {
namespace {

using Values = std::vector<double>;

Context host_context() {
  Context context;
  context.backend = "reference";
  context.num_threads = 1;
  return context;
}

std::string target_name(const ::testing::TestParamInfo<Target>& info) {
  return info.param.backend + (info.param.device.type == DeviceType::kCuda ? "_cuda" : "_cpu");
}

// One side of a comparison: a context and the memory its tensors lie in.
struct Side {
  const Target& target;
  Context context;

  static Side host() { return {host_target(), host_context()}; }
  static Side device(const Target& target) { return {target, target.context(3)}; }

  Tensor input(DType dtype, std::vector<std::int64_t> shape, const Values& values) const {
    Tensor tensor(target, dtype, std::move(shape));
    tensor.fill(values);
    return tensor;
  }
  Tensor floats(std::vector<std::int64_t> shape, const Values& values) const {
    return input(DType::kFloat32, std::move(shape), values);
  }
  Tensor ids(DType dtype, std::vector<std::int64_t> shape, const Values& values) const {
    Tensor tensor(target, dtype, std::move(shape));
    tensor.fill_ids(std::vector<std::int64_t>(values.begin(), values.end()));
    return tensor;
  }
  Tensor output(DType dtype, std::vector<std::int64_t> shape) const {
    return Tensor(target, dtype, std::move(shape));
  }
};

void expect_output(const Tensor& tensor) { EXPECT_EQ(tensor.violation_as_output(), ""); }

// |actual - expected| <= tolerance * max|expected|, and something to compare.
void expect_close(const Values& actual, const Values& expected, double tolerance) {
  ASSERT_EQ(actual.size(), expected.size());
  double largest = 0.0;
  for (const double value : expected) largest = std::max(largest, std::abs(value));
  ASSERT_GT(largest, 0.0);
  for (std::size_t i = 0; i < actual.size(); ++i) {
    ASSERT_LE(std::abs(actual[i] - expected[i]), tolerance * largest)
        << "element " << i << ": " << actual[i] << ", expected " << expected[i];
  }
}

// Logits whose experts differ in popularity, so that row counts differ; `ties` rounds them so that
// many are equal.
Values make_logits(std::int64_t num_tokens, std::int64_t num_experts, double skew, bool ties,
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

constexpr double kOneRounding = 1.5e-7;  // relative to the largest: two float32 roundings

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
      {400, 48, 6, kTopKSoftmax, {}, false, 1, 1, 1.0f, false, true},
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

class RouterOps : public ::testing::TestWithParam<Target> {};
INSTANTIATE_TEST_SUITE_P(Targets, RouterOps, ::testing::ValuesIn(targets()), target_name);

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

std::vector<RoundCase> round_cases() {
  std::vector<RoundCase> cases = {
      {1, 1, 1, 1},       {5, 3, 2, 2},      {31, 7, 3, 4},          {32, 8, 2, 8},
      {33, 40, 4, 16},    {700, 300, 5, 16}, {1030, 12, 3, 128},     {2500, 64, 8, 128},
      {2500, 64, 8, 100}, {513, 6, 6, 128},  {512, 1, 1, 512},       {600, 24, 3, 64, 30.0},
      {4096, 10, 2, 256}, {900, 1100, 4, 8}, {1500, 20, 4, 32, 6.0}, {5000, 5, 1, 1000},
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
  const RoundCase c{1000, 48, 4, 32};
  const std::vector<RouteCase> routers = {
      {1000, 48, 4, kTopKSoftmax, {}, false, 1, 1, 2.0f},
      {1000, 48, 4, kSoftmaxTopK},
      {1000, 48, 4, kSoftmaxTopK, true},
      {1000, 48, 4, kSigmoidTopK, {}, true, 4, 2, 2.5f},
      {1000, 48, 4, kSigmoidTopK, false},
  };
  for (const RouteCase& router : routers) {
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

// -------------------------------------------------------------------------------------- balancing

struct Losses {
  Values balancing, balancing_grad, z, z_grad, bias;
};

Losses losses(const Side& side, std::int64_t num_tokens, std::int64_t num_experts, Scoring scoring,
              double shift) {
  Values values = make_logits(num_tokens, num_experts, 1.0, false, 21);
  for (double& value : values) value = static_cast<float>(value + shift);
  const Tensor logits = side.floats({num_tokens, num_experts}, values);
  Values counts;
  for (std::int64_t e = 0; e < num_experts; ++e) {
    counts.push_back(static_cast<double>((e * 37) % 19 + 1));
  }
  const Tensor rows = side.ids(DType::kInt32, {num_experts}, counts);
  const Tensor grad_loss = side.floats({1}, {0.5});
  const Tensor balancing = side.output(DType::kFloat32, {1});
  const Tensor z = side.output(DType::kFloat32, {1});
  const Tensor balancing_grad = side.output(DType::kFloat32, {num_tokens, num_experts});
  const Tensor z_grad = side.output(DType::kFloat32, {num_tokens, num_experts});
  const Tensor bias = side.floats({num_experts}, make_logits(1, num_experts, 0.0, false, 22));
  load_balancing_loss_forward(side.context, scoring, 1, logits.view(), rows.view(),
                              balancing.view());
  load_balancing_loss_backward(side.context, scoring, 1, logits.view(), rows.view(),
                               grad_loss.view(), balancing_grad.view());
  router_z_loss_forward(side.context, logits.view(), z.view());
  router_z_loss_backward(side.context, logits.view(), grad_loss.view(), z_grad.view());
  update_expert_bias(side.context, bias.view(), rows.view(), 0.01f);
  for (const Tensor* output : {&balancing, &z, &balancing_grad, &z_grad, &bias}) {
    expect_output(*output);
  }
  return {balancing.values(), balancing_grad.values(), z.values(), z_grad.values(), bias.values()};
}

TEST_P(RouterOps, LossesAgreeWithTheHost) {
  struct Shape {
    std::int64_t num_tokens, num_experts;
  };
  for (const auto& [num_tokens, num_experts] :
       {Shape{1, 2}, Shape{77, 5}, Shape{1000, 32}, Shape{333, 129}, Shape{4100, 256}}) {
    for (const Scoring scoring : {Scoring::kSoftmaxTopK, Scoring::kSigmoidTopK}) {
      for (const double shift : {0.0, -60.0, 30.0, -1000.0}) {
        SCOPED_TRACE("T=" + std::to_string(num_tokens) + " E=" + std::to_string(num_experts) + " " +
                     std::string(name_of(scoring)) + " shift=" + std::to_string(shift));
        const Losses expected = losses(Side::host(), num_tokens, num_experts, scoring, shift);
        const Losses actual =
            losses(Side::device(GetParam()), num_tokens, num_experts, scoring, shift);
        expect_close(actual.balancing, expected.balancing, 2.5e-7);
        expect_close(actual.z, expected.z, 2.5e-7);
        expect_close(actual.z_grad, expected.z_grad, kOneRounding);
        EXPECT_EQ(actual.bias, expected.bias);
        if (scoring == Scoring::kSigmoidTopK && shift > 0) continue;  // the gradient vanishes
        expect_close(actual.balancing_grad, expected.balancing_grad, kOneRounding);
      }
    }
  }
}

TEST_P(RouterOps, AddLogitsGradient) {
  const Side side = Side::device(GetParam());
  const Tensor sum = side.floats({301, 7}, make_logits(301, 7, 0.0, true, 31));
  const Tensor addend = side.floats({301, 7}, make_logits(301, 7, 0.0, true, 32));
  Values expected = sum.values();
  const Values added = addend.values();
  for (std::size_t i = 0; i < expected.size(); ++i) expected[i] += added[i];
  choose_backend(side.context, "test").add_logits_gradient(side.context, sum.view(), addend.view());
  EXPECT_EQ(sum.values(), expected);
}

// ------------------------------------------------------------------------------- matrix products

struct ProductCase {
  std::int64_t num_tokens, hidden_size, num_experts;
  DType x, weight;
  bool bias;
  bool accumulate;
  Strides strides = Strides::kContiguous;

  std::string text() const {
    return "T=" + std::to_string(num_tokens) + " d=" + std::to_string(hidden_size) +
           " E=" + std::to_string(num_experts) + " x " + std::string(name_of(x)) + " Wr " +
           std::string(name_of(weight)) + " " + name_of(strides);
  }
};

std::vector<ProductCase> product_cases() {
  const DType f32 = DType::kFloat32, bf16 = DType::kBFloat16;
  return {
      {1, 1, 1, f32, f32, false, false},
      {70, 33, 5, f32, f32, true, true},
      {300, 200, 66, f32, f32, true, false},
      {300, 200, 66, bf16, bf16, true, false},
      {129, 520, 130, bf16, bf16, false, true},
      {1, 8, 1, bf16, bf16, true, false},
      {260, 100, 12, bf16, bf16, true, true},  // d no multiple of 8
      {64, 64, 32, bf16, f32, true, false},
      {130, 72, 20, bf16, bf16, true, false, Strides::kPadded},
      {1500, 128, 256, bf16, bf16, false, false},
      {1500, 136, 40, bf16, f32, true, true},
  };
}

// sum_k left(i, k) right(k, j), and the sums of |terms|.
struct Product {
  Values sums, magnitudes;
};
template <class Left, class Right>
Product multiply(std::int64_t rows, std::int64_t columns, std::int64_t depth, const Left& left,
                 const Right& right) {
  Product product;
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      double sum = 0.0, magnitude = 0.0;
      for (std::int64_t k = 0; k < depth; ++k) {
        const double term = left(i, k) * right(k, j);
        sum += term;
        magnitude += std::abs(term);
      }
      product.sums.push_back(sum);
      product.magnitudes.push_back(magnitude);
    }
  }
  return product;
}

// Float32 sums: |error| <= 2^-20 sum|terms|, plus the rounding of a bfloat16 result. An operand
// rounded to bfloat16 or TF32 on the way would be off by 2^-12 and more.
void expect_product(const Values& actual, const Product& expected, DType dtype) {
  ASSERT_EQ(actual.size(), expected.sums.size());
  const double rounding = dtype == DType::kBFloat16 ? 0x1p-8 : 0.0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const double tolerance =
        0x1p-20 * expected.magnitudes[i] + rounding * std::abs(expected.sums[i]);
    ASSERT_LE(std::abs(actual[i] - expected.sums[i]), tolerance)
        << "element " << i << ": " << actual[i] << ", expected " << expected.sums[i];
  }
}

Tensor strided_input(const Side& side, DType dtype, std::vector<std::int64_t> shape,
                     Strides strides, std::uint64_t seed) {
  Tensor tensor(side.target, dtype, shape, strides);
  tensor.fill(make_logits(shape[0], shape.size() > 1 ? shape[1] : 1, 0.0, false, seed));
  return tensor;
}

MoEShape shape_of(const ProductCase& c) {
  MoEShape shape;
  shape.num_tokens = c.num_tokens;
  shape.hidden_size = c.hidden_size;
  shape.num_experts = c.num_experts;
  shape.dtype = c.x;
  return shape;
}

std::size_t at(std::int64_t row, std::int64_t columns, std::int64_t column) {
  return static_cast<std::size_t>(row * columns + column);
}

void check_logits(const Side& side, const ProductCase& c) {
  const std::int64_t num_tokens = c.num_tokens, d = c.hidden_size, num_experts = c.num_experts;
  const Backend& backend = choose_backend(side.context, "test");
  const Tensor x = strided_input(side, c.x, {num_tokens, d}, c.strides, 41);
  const Tensor weight = strided_input(side, c.weight, {num_experts, d}, c.strides, 42);
  Tensor bias;
  if (c.bias) bias = strided_input(side, c.weight, {num_experts}, Strides::kContiguous, 43);
  const Tensor logits = side.output(DType::kFloat32, {num_tokens, num_experts});
  const GuardedBuffer workspace(side.target,
                                backend.router_logits_workspace_bytes(side.context, shape_of(c)));
  backend.router_logits(side.context, x.view(), weight.view(), bias.view(), logits.view(),
                        workspace.view());
  const Values xs = x.values(), ws = weight.values();
  const Values bs = c.bias ? bias.values() : Values();
  const Product expected = multiply(
      num_tokens, num_experts, d + 1,
      [&](std::int64_t t, std::int64_t k) { return k < d ? xs[at(t, d, k)] : 1.0; },
      [&](std::int64_t k, std::int64_t e) {
        return k < d ? ws[at(e, d, k)] : c.bias ? bs[static_cast<std::size_t>(e)] : 0.0;
      });
  expect_product(logits.values(), expected, DType::kFloat32);
  expect_output(logits);
  EXPECT_TRUE(workspace.guards_intact());
}

void check_gradients(const Side& side, const ProductCase& c) {
  const std::int64_t num_tokens = c.num_tokens, d = c.hidden_size, num_experts = c.num_experts;
  const Backend& backend = choose_backend(side.context, "test");
  const Tensor x = strided_input(side, c.x, {num_tokens, d}, c.strides, 51);
  const Tensor grad =
      strided_input(side, DType::kFloat32, {num_tokens, num_experts}, Strides::kContiguous, 52);
  const DType dtype = c.accumulate ? DType::kFloat32 : c.weight;
  Tensor grad_weight(side.target, dtype, {num_experts, d}, c.strides);
  Tensor grad_bias(side.target, dtype, {num_experts});
  const double before = c.accumulate ? 0.25 : 0.0;
  if (c.accumulate) {
    grad_weight.fill_constant(before);
    grad_bias.fill_constant(before);
  }
  const GuardedBuffer workspace(side.target,
                                backend.router_logits_workspace_bytes(side.context, shape_of(c)));
  backend.router_logits_backward(side.context, x.view(), grad.view(), grad_weight.view(),
                                 grad_bias.view(), c.accumulate, workspace.view());
  const Values xs = x.values(), gs = grad.values();
  const auto left = [&](std::int64_t e, std::int64_t t) {
    return t < num_tokens ? gs[at(t, num_experts, e)] : before;
  };
  const auto right = [&](std::int64_t t, std::int64_t column) {
    return t < num_tokens ? xs[at(t, d, column)] : 1.0;
  };
  const auto ones = [](std::int64_t, std::int64_t) { return 1.0; };
  expect_product(grad_weight.values(), multiply(num_experts, d, num_tokens + 1, left, right),
                 dtype);
  expect_product(grad_bias.values(), multiply(num_experts, 1, num_tokens + 1, left, ones), dtype);
  expect_output(grad_weight);
  expect_output(grad_bias);
  EXPECT_TRUE(workspace.guards_intact());
}

TEST_P(RouterOps, LogitsMatchFloat64) {
  for (const ProductCase& c : product_cases()) {
    SCOPED_TRACE(c.text());
    check_logits(Side::device(GetParam()), c);
  }
}

TEST_P(RouterOps, LogitsGradientsMatchFloat64) {
  for (const ProductCase& c : product_cases()) {
    SCOPED_TRACE(c.text());
    check_gradients(Side::device(GetParam()), c);
  }
}

TEST_P(RouterOps, GradientsOfNoTokensAreZero) {
  const Side side = Side::device(GetParam());
  const Backend& backend = choose_backend(side.context, "test");
  const Tensor x = side.output(DType::kFloat32, {0, 40});
  const Tensor grad = side.output(DType::kFloat32, {0, 70});
  const Tensor grad_weight = side.output(DType::kFloat32, {70, 40});
  const Tensor grad_bias = side.output(DType::kFloat32, {70});
  const GuardedBuffer workspace(
      side.target,
      backend.router_logits_workspace_bytes(
          side.context, shape_of({0, 40, 70, DType::kFloat32, DType::kFloat32, true, false})));
  backend.router_logits_backward(side.context, x.view(), grad.view(), grad_weight.view(),
                                 grad_bias.view(), false, workspace.view());
  EXPECT_EQ(grad_weight.values(), Values(70 * 40, 0.0));
  EXPECT_EQ(grad_bias.values(), Values(70, 0.0));
}

}  // namespace
}  // namespace sonicmoe::testing
