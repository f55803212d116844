// moe_layer against the composition of its parts and against the float64 definition, with gradients
// through the routing taken from central differences of the weight formula.
#include "sonicmoe/moe_layer.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "oracle/router.hpp"
#include "rig/compare.hpp"
#include "rig/naive.hpp"
#include "rig/random.hpp"

namespace sonicmoe::rig {
namespace {

struct LayerCase {
  const char* name;
  DType dtype = DType::kFloat32;
  DType router_dtype = DType::kFloat32;
  Scoring scoring = Scoring::kSoftmaxTopK;
  bool renormalize = true;
  bool rounding = false;
  bool router_bias = false;
  bool auxiliary = false;  // grad_logits from an auxiliary loss
  bool deterministic = true;
  float scale = 1.0f;
  std::int64_t T = 41, d = 48, E = 8;
};

constexpr std::int64_t n = 24, K = 2, kTile = 8;

std::vector<double> normal(Random& random, std::int64_t count, double scale) {
  std::vector<double> values(static_cast<std::size_t>(count));
  for (double& value : values) value = scale * random.normal();
  return values;
}

// Every tensor of a forward and backward call of one case on one target.
struct Layer {
  Layer(const Target& target_, const LayerCase& c_, std::optional<std::size_t> limit = {},
        std::optional<std::size_t> backward_limit = {})
      : target(target_), c(c_), T(c_.T), d(c_.d), E(c_.E) {
    inputs = std::make_unique<MoEInputs>(target, experts(c));
    options.experts = experts(c).options();
    options.router.top_k = K;
    options.router.scoring = c.scoring;
    options.router.renormalize = c.renormalize;
    options.router.scale = c.scale;
    if (c.rounding) options.rounding = RoundingOptions{kTile, RoundingPolicy::kNearest, 0, {}};

    Random random(78);
    router_weight = make(c.router_dtype, {E, d});
    router_weight.fill(normal(random, E * d, 1.0 / std::sqrt(static_cast<double>(d))));
    if (c.router_bias) {
      router_bias = make(c.router_dtype, {E});
      router_bias.fill(normal(random, E, 0.5));
    }
    shape = moe_layer_shape(options, inputs->x.view(), inputs->weights());
    out = make(c.dtype, {T, d});
    logits = make(DType::kFloat32, {T, E});
    rows_per_expert = make(DType::kInt32, {E});
    topk_ids = make(DType::kInt32, {T, K});
    if (c.rounding) {
      token_ids = make(DType::kInt32, {shape.num_pairs});
      expert_ids = make(DType::kInt32, {shape.num_pairs});
      pair_weights = make(DType::kFloat32, {shape.num_pairs});
    } else {
      pair_weights = make(DType::kFloat32, {T, K});
    }
    h = make(c.dtype, {shape.num_pairs, shape.h_columns()});
    metadata = GuardedBuffer(target, moe_metadata_bytes(shape));
    grad_logits = make(DType::kFloat32, {T, E});
    grad_logits.fill(normal(random, T * E, 0.05));
    forward(limit);
    backward(backward_limit);
  }

  Tensor make(DType dtype, std::vector<std::int64_t> extents) const {
    return Tensor(target, dtype, std::move(extents));
  }
  MoELayerSaved saved() const {
    return {topk_ids.view(),     token_ids.view(), expert_ids.view(),
            pair_weights.view(), h.view(),         metadata.view()};
  }
  Routing routing() const {
    if (c.rounding) return PairRouting{token_ids.view(), expert_ids.view(), pair_weights.view()};
    return TopKRouting{topk_ids.view(), pair_weights.view()};
  }
  static MoECase experts(const LayerCase& c) {
    MoECase result;
    result.num_tokens = c.T, result.hidden_size = c.d, result.intermediate_size = n;
    result.num_experts = c.E, result.top_k = K, result.dtype = c.dtype, result.seed = 77;
    result.deterministic = c.deterministic;
    return result;
  }

  void forward(std::optional<std::size_t> limit) {
    const Context context = target.context();
    forward_plan = moe_layer_forward_workspace(context, options, shape, false, limit);
    const GuardedBuffer workspace(target, forward_plan.bytes);
    MoELayerForwardArgs args;
    args.options = options;
    args.x = inputs->x.view();
    args.router_weight = router_weight.view();
    args.router_bias = router_bias.view();
    args.weights = inputs->weights();
    args.out = out.view();
    args.logits = logits.view();
    args.rows_per_expert = rows_per_expert.view();
    args.saved = saved();
    args.workspace = workspace.view();
    args.workspace_limit = limit;
    moe_layer_forward(context, args);
    EXPECT_TRUE(workspace.guards_intact());
    EXPECT_TRUE(metadata.guards_intact());
    for (const Tensor* tensor :
         {&out, &logits, &rows_per_expert, &topk_ids, &token_ids, &expert_ids, &pair_weights, &h}) {
      EXPECT_EQ(tensor->violation_as_output(), "");
    }
  }

  void backward(std::optional<std::size_t> limit) {
    const Context context = target.context();
    backward_plan = moe_layer_backward_workspace(context, options, shape, limit);
    const GuardedBuffer workspace(target, backward_plan.bytes);
    grad_x = make(c.dtype, {T, d});
    grad_router_weight = make(DType::kFloat32, {E, d});
    if (c.router_bias) grad_router_bias = make(DType::kFloat32, {E});
    grad_w1 = make(c.dtype, {E, 2 * n, d});
    grad_b1 = make(c.dtype, {E, 2 * n});
    grad_w2 = make(c.dtype, {E, d, n});
    grad_b2 = make(c.dtype, {E, d});
    MoELayerBackwardArgs args;
    args.options = options;
    args.grad_out = inputs->grad_out.view();
    if (c.auxiliary) args.grad_logits = grad_logits.view();
    args.x = inputs->x.view();
    args.router_weight = router_weight.view();
    args.weights = inputs->weights();
    args.logits = logits.view();
    args.saved = saved();
    args.grad_x = grad_x.view();
    args.grad_router_weight = grad_router_weight.view();
    args.grad_router_bias = grad_router_bias.view();
    args.grad_w1 = grad_w1.view();
    args.grad_b1 = grad_b1.view();
    args.grad_w2 = grad_w2.view();
    args.grad_b2 = grad_b2.view();
    args.workspace = workspace.view();
    args.workspace_limit = limit;
    moe_layer_backward(context, args);
    EXPECT_TRUE(workspace.guards_intact());
    for (const Tensor* tensor : {&grad_x, &grad_router_weight, &grad_router_bias, &grad_w1,
                                 &grad_b1, &grad_w2, &grad_b2}) {
      EXPECT_EQ(tensor->violation_as_output(), "");
    }
    EXPECT_TRUE(inputs->violations().empty());
    EXPECT_EQ(grad_logits.violation_as_input(), "");
    EXPECT_EQ(router_weight.violation_as_input(), "");
  }

  const Target& target;
  LayerCase c;
  std::int64_t T, d, E;
  MoELayerOptions options;
  MoEShape shape;
  std::unique_ptr<MoEInputs> inputs;
  Tensor router_weight, router_bias, out, logits, rows_per_expert, topk_ids, token_ids, expert_ids,
      pair_weights, h, grad_logits;
  Tensor grad_x, grad_router_weight, grad_router_bias, grad_w1, grad_b1, grad_w2, grad_b2;
  GuardedBuffer metadata;
  WorkspacePlan forward_plan, backward_plan;
};

// What the oracle reads, in host memory: the inputs and the routing of a layer on any target.
struct HostCopy {
  explicit HostCopy(const Layer& layer)
      : inputs(host_target(), Layer::experts(layer.c)),
        router_weight(copy(layer.router_weight)),
        router_bias(copy(layer.router_bias)),
        topk_ids(copy(layer.topk_ids)),
        token_ids(copy(layer.token_ids)),
        expert_ids(copy(layer.expert_ids)),
        pair_weights(copy(layer.pair_weights)) {}

  static Tensor copy(const Tensor& tensor) {
    if (!tensor.defined()) return {};
    const auto shape = tensor.view().shape();
    Tensor result(host_target(), tensor.dtype(), {shape.begin(), shape.end()});
    const std::vector<double> values = tensor.values();
    if (tensor.dtype() == DType::kInt32) {
      result.fill_ids({values.begin(), values.end()});
    } else {
      result.fill(values);
    }
    return result;
  }
  Routing routing(const LayerCase& c) const {
    if (c.rounding) return PairRouting{token_ids.view(), expert_ids.view(), pair_weights.view()};
    return TopKRouting{topk_ids.view(), pair_weights.view()};
  }

  MoEInputs inputs;
  Tensor router_weight, router_bias, topk_ids, token_ids, expert_ids, pair_weights;
};

// weight(t, e) of the page for given logits of a token, its top-K held fixed.
double routing_weight(const LayerCase& c, const std::vector<double>& logits,
                      const std::vector<std::size_t>& top_k, std::size_t expert) {
  const auto score = [&](std::size_t e) {
    if (c.scoring == Scoring::kSigmoidTopK) return 1.0 / (1.0 + std::exp(-logits[e]));
    double sum = 0;  // softmax over E; exp(logit) up to a factor that cancels
    for (const double logit : logits) sum += std::exp(logit);
    return std::exp(logits[e]) / sum;
  };
  double z = 1.0;
  if (c.renormalize || c.scoring == Scoring::kTopKSoftmax) {
    z = 0.0;
    for (const std::size_t e : top_k) z += score(e);
  }
  return static_cast<double>(c.scale) * score(expert) / z;
}

// d(sum over the rows of d_s * weight) / d logits by central differences in float64.
std::vector<double> logits_gradient(const Layer& layer, const std::vector<oracle::Row>& rows,
                                    const std::vector<double>& d_s) {
  const std::int64_t E = layer.E;
  const std::vector<double> logits = layer.logits.values(), ids = layer.topk_ids.values();
  std::vector<double> gradient(logits.size(), 0.0);
  for (const oracle::Row& row : rows) {
    const auto t = static_cast<std::size_t>(row.token);
    const auto expert = static_cast<std::size_t>(row.expert);
    std::vector<double> own(logits.begin() + row.token * E, logits.begin() + (row.token + 1) * E);
    std::vector<std::size_t> top_k;
    for (std::size_t k = 0; k < K; ++k) top_k.push_back(static_cast<std::size_t>(ids[t * K + k]));
    for (std::size_t e = 0; e < static_cast<std::size_t>(E); ++e) {
      constexpr double kStep = 1e-5;
      std::vector<double> above = own, below = own;
      above[e] += kStep;
      below[e] -= kStep;
      const double slope = (routing_weight(layer.c, above, top_k, expert) -
                            routing_weight(layer.c, below, top_k, expert)) /
                           (2 * kStep);
      gradient[t * static_cast<std::size_t>(E) + e] +=
          d_s[static_cast<std::size_t>(row.position)] * slope;
    }
  }
  return gradient;
}

// Rounded as a stored tensor would be.
std::vector<double> stored(DType dtype, std::vector<double> values) {
  for (double& value : values) value = oracle::rounded_to(dtype, value);
  return values;
}
std::vector<double> sum(std::vector<double> a, const std::vector<double>& b) {
  for (std::size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

void expect_close(const char* name, const Tensor& actual, const std::vector<double>& reference,
                  const std::vector<double>& naive, DType floor_dtype) {
  const Comparison result = compare(actual.values(), reference, naive,
                                    2 * relative_floor(floor_dtype) * max_abs(reference));
  EXPECT_GT(result.scale, 0.0) << name;
  EXPECT_LE(result.error, result.tolerance) << name << ": max|reference| " << result.scale;
  EXPECT_FALSE(result.vacuous()) << name;
}

constexpr LayerCase kCases[] = {
    {.name = "softmax_renormalized"},
    {.name = "softmax_plain", .renormalize = false, .auxiliary = true},
    {.name = "topk_softmax_bias", .scoring = Scoring::kTopKSoftmax, .router_bias = true},
    {.name = "sigmoid_scaled", .scoring = Scoring::kSigmoidTopK, .scale = 2.5f},
    {.name = "bf16", .dtype = DType::kBFloat16, .router_dtype = DType::kBFloat16},
    {.name = "bf16_auxiliary",
     .dtype = DType::kBFloat16,
     .router_dtype = DType::kBFloat16,
     .scoring = Scoring::kTopKSoftmax,
     .router_bias = true,
     .auxiliary = true},
    {.name = "bf16_sigmoid",
     .dtype = DType::kBFloat16,
     .router_dtype = DType::kBFloat16,
     .scoring = Scoring::kSigmoidTopK,
     .scale = 2.5f},
    {.name = "bf16_plain",
     .dtype = DType::kBFloat16,
     .router_dtype = DType::kBFloat16,
     .renormalize = false},
    // Six experts: no product of the router is on the grouped GEMMs; twelve: dWr is, not dX's
    // share.
    {.name = "bf16_six_experts",
     .dtype = DType::kBFloat16,
     .router_dtype = DType::kBFloat16,
     .E = 6},
    {.name = "bf16_twelve_experts",
     .dtype = DType::kBFloat16,
     .router_dtype = DType::kBFloat16,
     .router_bias = true,
     .E = 12},
    // Several slabs of d under a limit, several slices of the tokens in dWr.
    {.name = "bf16_slabs",
     .dtype = DType::kBFloat16,
     .router_dtype = DType::kBFloat16,
     .router_bias = true,
     .T = 520,
     .d = 264},
    // Two rows a token: their sum is the same in either order.
    {.name = "bf16_any_order",
     .dtype = DType::kBFloat16,
     .router_dtype = DType::kBFloat16,
     .router_bias = true,
     .auxiliary = true,
     .deterministic = false},
    {.name = "bf16_plain_slabs",
     .dtype = DType::kBFloat16,
     .router_dtype = DType::kBFloat16,
     .renormalize = false,
     .T = 520,
     .d = 264},
    {.name = "bf16_float_router", .dtype = DType::kBFloat16, .auxiliary = true},
    {.name = "rounding", .rounding = true, .auxiliary = true},
    {.name = "rounding_plain", .renormalize = false, .rounding = true},
    {.name = "rounding_topk_softmax", .scoring = Scoring::kTopKSoftmax, .rounding = true},
    {.name = "rounding_sigmoid_bf16",
     .dtype = DType::kBFloat16,
     .router_dtype = DType::kBFloat16,
     .scoring = Scoring::kSigmoidTopK,
     .rounding = true,
     .router_bias = true},
    {.name = "rounding_bf16_auxiliary",
     .dtype = DType::kBFloat16,
     .router_dtype = DType::kBFloat16,
     .scoring = Scoring::kTopKSoftmax,
     .rounding = true,
     .auxiliary = true,
     .T = 520,
     .d = 264,
     .E = 48},
    {.name = "rounding_bf16_plain",
     .dtype = DType::kBFloat16,
     .router_dtype = DType::kBFloat16,
     .renormalize = false,
     .rounding = true},
    {.name = "rounding_bf16_six_experts",
     .dtype = DType::kBFloat16,
     .router_dtype = DType::kBFloat16,
     .rounding = true,
     .E = 6},
};

class MoELayerTest : public ::testing::TestWithParam<std::tuple<Target, LayerCase>> {
 protected:
  const Target& target() const { return std::get<0>(GetParam()); }
  const LayerCase& layer_case() const { return std::get<1>(GetParam()); }
};

// Every case on every target that computes in its dtype.
std::vector<std::tuple<Target, LayerCase>> all_cases() {
  std::vector<std::tuple<Target, LayerCase>> result;
  for (const Target& target : targets()) {
    for (const LayerCase& c : kCases) {
      if (fitted(target, Layer::experts(c)).dtype == c.dtype) result.emplace_back(target, c);
    }
  }
  return result;
}

INSTANTIATE_TEST_SUITE_P(Backends, MoELayerTest, ::testing::ValuesIn(all_cases()),
                         [](const auto& test) {
                           return std::get<0>(test.param).backend + "_" +
                                  std::get<1>(test.param).name;
                         });

TEST_P(MoELayerTest, LogitsAndWeightsFollowTheFormula) {
  const Layer layer(target(), layer_case());
  const std::int64_t T = layer.T, E = layer.E;
  const HostCopy host(layer);
  const auto reference = oracle::router_logits(host.inputs.x.view(), host.router_weight.view(),
                                               host.router_bias.view());
  // 48 to 264 products in float32, whatever the dtype of x.
  EXPECT_LE(max_error(layer.logits.values(), reference), 2e-6 * max_abs(reference) + 1e-6);

  const std::vector<double> logits = layer.logits.values(), ids = layer.topk_ids.values(),
                            weights = layer.pair_weights.values();
  std::vector<double> rows(static_cast<std::size_t>(E), 0.0);
  const auto pairs = oracle::sorted_rows(host.routing(layer.c), T, E);
  EXPECT_FALSE(pairs.empty());
  for (const oracle::Row& row : pairs) {
    rows[static_cast<std::size_t>(row.expert)] += 1;
    const std::vector<double> own(logits.begin() + row.token * E,
                                  logits.begin() + (row.token + 1) * E);
    const auto t = static_cast<std::size_t>(row.token);
    const std::vector<std::size_t> top_k = {static_cast<std::size_t>(ids[t * K]),
                                            static_cast<std::size_t>(ids[t * K + 1])};
    const double expected =
        routing_weight(layer.c, own, top_k, static_cast<std::size_t>(row.expert));
    EXPECT_NEAR(weights[static_cast<std::size_t>(row.position)], expected, 1e-6 * expected);
  }
  EXPECT_EQ(layer.rows_per_expert.values(), rows);
  if (layer.c.rounding) {
    for (const double count : rows) EXPECT_EQ(std::fmod(count, static_cast<double>(kTile)), 0.0);
  }
}

TEST_P(MoELayerTest, ForwardIsTheCompositionBitForBit) {
  const Layer layer(target(), layer_case());
  const std::int64_t T = layer.T, d = layer.d, E = layer.E;
  const Context context = target().context();
  Tensor ids = layer.make(DType::kInt32, {T, K});
  if (layer.c.rounding) {
    Tensor tokens = layer.make(DType::kInt32, {layer.shape.num_pairs});
    Tensor experts = layer.make(DType::kInt32, {layer.shape.num_pairs});
    Tensor weights = layer.make(DType::kFloat32, {layer.shape.num_pairs});
    const GuardedBuffer workspace(target(), round_tokens_workspace_bytes(context, T, E, K));
    RoundTokensForwardArgs args;
    args.options = layer.options.router;
    args.rounding = *layer.options.rounding;
    args.logits = layer.logits.view();
    args.token_ids = tokens.view();
    args.expert_ids = experts.view();
    args.pair_weights = weights.view();
    args.topk_ids = ids.view();
    args.workspace = workspace.view();
    round_tokens_forward(context, args);
    EXPECT_EQ(bitwise_difference(tokens.values(), layer.token_ids.values()), "");
    EXPECT_EQ(bitwise_difference(experts.values(), layer.expert_ids.values()), "");
    EXPECT_EQ(bitwise_difference(weights.values(), layer.pair_weights.values()), "");
  } else {
    Tensor weights = layer.make(DType::kFloat32, {T, K});
    RouteForwardArgs args;
    args.options = layer.options.router;
    args.logits = layer.logits.view();
    args.topk_ids = ids.view();
    args.topk_weights = weights.view();
    route_forward(context, args);
    EXPECT_EQ(bitwise_difference(weights.values(), layer.pair_weights.values()), "");
  }
  EXPECT_EQ(bitwise_difference(ids.values(), layer.topk_ids.values()), "");

  const Tensor out = layer.make(layer.c.dtype, {T, d});
  const GuardedBuffer workspace(target(), moe_forward_workspace(context, layer.shape, true).bytes);
  MoEForwardArgs args;
  args.options = layer.options.experts;
  args.x = layer.inputs->x.view();
  args.weights = layer.inputs->weights();
  args.routing = layer.routing();
  args.out = out.view();
  args.workspace = workspace.view();
  moe_forward(context, args);
  EXPECT_EQ(bitwise_difference(out.values(), layer.out.values()), "");
}

TEST_P(MoELayerTest, GradientsMatchTheDefinition) {
  const Layer layer(target(), layer_case());
  const std::int64_t T = layer.T, E = layer.E;
  const HostCopy host(layer);
  const oracle::Problem problem{layer.options.experts, host.inputs.x.view(), host.inputs.weights(),
                                host.routing(layer.c)};
  const auto rows = oracle::sorted_rows(problem.routing, T, E);
  std::vector<double> h = layer.h.values();
  h.resize(rows.size() * static_cast<std::size_t>(layer.shape.h_columns()));
  const ConstTensorView grad_out = host.inputs.grad_out.view();
  const auto exact = oracle::backward(problem, rows, h, grad_out);
  const auto naive = naive_backward(problem, rows, h, grad_out, layer.c.dtype);

  const auto all_logits = [&](const oracle::BackwardResult& experts) {
    std::vector<double> result = logits_gradient(layer, rows, experts.grad_routing_weights);
    return layer.c.auxiliary ? sum(result, layer.grad_logits.values()) : result;
  };
  const std::vector<double> exact_logits = all_logits(exact), naive_logits = all_logits(naive);
  const auto exact_router = oracle::router_gradients(exact_logits, E, problem.x);
  const auto naive_router = oracle::router_gradients(naive_logits, E, problem.x);
  const DType dtype = layer.c.dtype;
  expect_close("grad_router_weight", layer.grad_router_weight, exact_router.weight,
               naive_router.weight, dtype);
  if (layer.c.router_bias) {
    // Softmax gradients of a token cancel in the sum over the tokens: the terms are the scale.
    EXPECT_LE(
        max_error(layer.grad_router_bias.values(), exact_router.bias),
        2 * max_error(naive_router.bias, exact_router.bias) +
            relative_floor(dtype) * max_abs(exact_logits) * std::sqrt(static_cast<double>(T)));
    EXPECT_GT(max_abs(exact_router.bias), 0.0);
  }
  const ConstTensorView router_weight = host.router_weight.view();
  expect_close(
      "grad_x", layer.grad_x, sum(exact.grad_x, oracle::router_grad_x(exact_logits, router_weight)),
      stored(dtype, sum(naive.grad_x, oracle::router_grad_x(naive_logits, router_weight))), dtype);
  expect_close("grad_w1", layer.grad_w1, exact.grad_w1, naive.grad_w1, dtype);
  expect_close("grad_b1", layer.grad_b1, exact.grad_b1, naive.grad_b1, dtype);
  expect_close("grad_w2", layer.grad_w2, exact.grad_w2, naive.grad_w2, dtype);
  expect_close("grad_b2", layer.grad_b2, exact.grad_b2, naive.grad_b2, dtype);
}

// dlogits in float32, from the parts of the layer, give dWr and db to 14 bits: backends may
// multiply it as two bfloat16 terms, but not as one.
TEST_P(MoELayerTest, RouterGradientsKeepFourteenBits) {
  const Layer layer(target(), layer_case());
  const Context context = target().context();
  const bool rounding = layer.c.rounding;
  const Tensor grad_weights = rounding ? layer.make(DType::kFloat32, {layer.shape.num_pairs})
                                       : layer.make(DType::kFloat32, {layer.T, K});
  const GuardedBuffer workspace(target(), moe_backward_workspace(context, layer.shape).bytes);
  MoEBackwardArgs experts;
  experts.options = layer.options.experts;
  experts.grad_out = layer.inputs->grad_out.view();
  experts.x = layer.inputs->x.view();
  experts.weights = layer.inputs->weights();
  experts.routing = layer.routing();
  experts.h = layer.h.view();
  experts.metadata = layer.metadata.view();
  experts.grad_routing_weights = grad_weights.view();
  experts.workspace = workspace.view();
  moe_backward(context, experts);

  const Tensor grad_logits = layer.make(DType::kFloat32, {layer.T, layer.E});
  if (rounding) {
    round_tokens_backward(
        context,
        {layer.options.router, layer.logits.view(), layer.topk_ids.view(), layer.token_ids.view(),
         layer.expert_ids.view(), grad_weights.view(), grad_logits.view()});
  } else {
    route_backward(context, {layer.options.router, layer.logits.view(), layer.topk_ids.view(),
                             grad_weights.view(), grad_logits.view()});
  }

  std::vector<double> exact = grad_logits.values();
  if (layer.c.auxiliary) exact = sum(exact, layer.grad_logits.values());
  const HostCopy host(layer);
  const auto reference = oracle::router_gradients(exact, layer.E, host.inputs.x.view());
  const double relative = std::ldexp(1.0, -14);
  EXPECT_LE(max_error(layer.grad_router_weight.values(), reference.weight),
            relative * max_abs(reference.weight));
  EXPECT_GT(max_abs(reference.weight), 0.0);
  if (layer.c.router_bias) {
    EXPECT_LE(max_error(layer.grad_router_bias.values(), reference.bias),
              relative * max_abs(exact) * std::sqrt(static_cast<double>(layer.T)));
  }
}

TEST_P(MoELayerTest, LimitAndRepetitionChangeNoBit) {
  const Layer layer(target(), layer_case());
  const Layer again(target(), layer_case(), layer.forward_plan.minimum_bytes,
                    layer.backward_plan.minimum_bytes);
  if (target().backend == "cuda" && layer.d > 256) {
    EXPECT_GT(again.backward_plan.num_slabs, 1);
  }
  const auto same = [](const Tensor& a, const Tensor& b) {
    return bitwise_difference(a.values(), b.values());
  };
  EXPECT_EQ(same(layer.out, again.out), "");
  if (layer.c.deterministic) {
    EXPECT_EQ(same(layer.grad_x, again.grad_x), "");
  }
  EXPECT_EQ(same(layer.grad_router_weight, again.grad_router_weight), "");
  if (layer.c.router_bias) {
    EXPECT_EQ(same(layer.grad_router_bias, again.grad_router_bias), "");
  }
  EXPECT_EQ(same(layer.grad_w1, again.grad_w1), "");
  EXPECT_EQ(same(layer.grad_w2, again.grad_w2), "");
}

}  // namespace
}  // namespace sonicmoe::rig
