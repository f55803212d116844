// moe_layer against the composition of its parts and against the float64 definition, with gradients
// through the routing taken from central differences of the weight formula.
#include "sonicmoe/moe_layer.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "ops/tuning.hpp"
#include "oracle/router.hpp"
#include "rig/layer_run.hpp"
#include "rig/moe_run.hpp"

namespace sonicmoe::rig {
namespace {

struct NamedCase {
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

LayerCase layer_case_of(const NamedCase& c) {
  LayerCase result;
  MoECase& experts = result.experts;
  experts.num_tokens = c.T, experts.hidden_size = c.d, experts.intermediate_size = n;
  experts.num_experts = c.E, experts.top_k = K, experts.dtype = c.dtype, experts.seed = 77;
  experts.deterministic = c.deterministic;
  result.router.scoring = c.scoring;
  result.router.renormalize = c.renormalize;
  result.router.scale = c.scale;
  if (c.rounding) result.rounding = RoundingOptions{kTile, RoundingPolicy::kNearest, 0, {}};
  result.router_dtype = c.router_dtype;
  result.router_bias = c.router_bias;
  result.auxiliary = c.auxiliary;
  return result;
}

constexpr NamedCase kCases[] = {
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

class MoELayerTest : public ::testing::TestWithParam<std::tuple<Target, NamedCase>> {
 protected:
  const Target& target() const { return std::get<0>(GetParam()); }
  LayerCase layer_case() const { return layer_case_of(std::get<1>(GetParam())); }
};

// Every case on every target that computes in its dtype.
std::vector<std::tuple<Target, NamedCase>> all_cases() {
  std::vector<std::tuple<Target, NamedCase>> result;
  for (const Target& target : targets()) {
    for (const NamedCase& c : kCases) {
      if (fitted(target, layer_case_of(c).experts).dtype == c.dtype) result.emplace_back(target, c);
    }
  }
  return result;
}

INSTANTIATE_TEST_SUITE_P(Backends, MoELayerTest, ::testing::ValuesIn(all_cases()),
                         [](const auto& test) {
                           return std::get<0>(test.param).backend + "_" +
                                  std::get<1>(test.param).name;
                         });

// Logits, choice, weights, output and gradients.
TEST_P(MoELayerTest, MatchesTheDefinition) {
  LayerRun layer(target(), layer_case());
  layer.forward();
  layer.backward();
  EXPECT_THAT(check_layer(layer), ::testing::IsEmpty());
  if (!layer.c.rounding) return;
  for (const double count : layer.rows_per_expert.values()) {
    EXPECT_EQ(std::fmod(count, static_cast<double>(kTile)), 0.0);
  }
}

TEST_P(MoELayerTest, ForwardIsTheCompositionBitForBit) {
  LayerRun layer(target(), layer_case());
  layer.forward();
  const MoECase& c = layer.c.experts;
  const Context context = target().context();
  const auto make = [&](DType dtype, std::vector<std::int64_t> shape) {
    return Tensor(target(), dtype, std::move(shape));
  };
  const auto same = [](const Tensor& a, const Tensor& b) {
    return bitwise_difference(a.values(), b.values());
  };
  const Tensor ids = make(DType::kInt32, {c.num_tokens, K});
  if (layer.c.rounding) {
    const Tensor tokens = make(DType::kInt32, {layer.shape.num_pairs});
    const Tensor experts = make(DType::kInt32, {layer.shape.num_pairs});
    const Tensor weights = make(DType::kFloat32, {layer.shape.num_pairs});
    const GuardedBuffer workspace(
        target(), round_tokens_workspace_bytes(context, c.num_tokens, c.num_experts, K));
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
    EXPECT_EQ(same(tokens, layer.token_ids), "");
    EXPECT_EQ(same(experts, layer.expert_ids), "");
    EXPECT_EQ(same(weights, layer.routing_weights), "");
  } else {
    const Tensor weights = make(DType::kFloat32, {c.num_tokens, K});
    RouteForwardArgs args;
    args.options = layer.options.router;
    args.logits = layer.logits.view();
    args.topk_ids = ids.view();
    args.topk_weights = weights.view();
    route_forward(context, args);
    EXPECT_EQ(same(weights, layer.routing_weights), "");
  }
  EXPECT_EQ(same(ids, layer.topk_ids), "");

  const Tensor out = make(c.dtype, {c.num_tokens, c.hidden_size});
  const GuardedBuffer workspace(target(), moe_forward_workspace(context, layer.shape, true).bytes);
  MoEForwardArgs args;
  args.options = layer.options.experts;
  args.x = layer.inputs.x.view();
  args.weights = layer.inputs.weights();
  args.routing = layer.routing();
  args.out = out.view();
  args.workspace = workspace.view();
  moe_forward(context, args);
  EXPECT_EQ(same(out, layer.out), "");
}

// dlogits in float32, from the parts of the layer, give dWr and db to 14 bits: backends may
// multiply it as two bfloat16 terms, but not as one.
TEST_P(MoELayerTest, RouterGradientsKeepFourteenBits) {
  LayerRun layer(target(), layer_case());
  layer.forward();
  layer.backward();
  const std::int64_t T = layer.c.experts.num_tokens, E = layer.c.experts.num_experts;
  const Context context = target().context();
  const Tensor grad_weights = layer.grad_routing_weights();
  const Tensor grad_logits(target(), DType::kFloat32, {T, E});
  if (layer.c.rounding) {
    round_tokens_backward(
        context,
        {layer.options.router, layer.logits.view(), layer.topk_ids.view(), layer.token_ids.view(),
         layer.expert_ids.view(), grad_weights.view(), grad_logits.view()});
  } else {
    route_backward(context, {layer.options.router, layer.logits.view(), layer.topk_ids.view(),
                             grad_weights.view(), grad_logits.view()});
  }
  Values exact = grad_logits.values();
  if (layer.c.auxiliary) {
    const Values added = layer.grad_logits.values();
    for (std::size_t i = 0; i < exact.size(); ++i) exact[i] += added[i];
  }
  const MoEInputs host(host_target(), layer.c.experts);
  const auto reference = oracle::router_gradients(exact, E, host.x.view());
  const double relative = std::ldexp(1.0, -14);
  EXPECT_LE(max_error(layer.grad_router_weight.values(), reference.weight),
            relative * max_abs(reference.weight));
  EXPECT_GT(max_abs(reference.weight), 0.0);
  if (layer.c.router_bias) {
    EXPECT_LE(max_error(layer.grad_router_bias.values(), reference.bias),
              relative * max_abs(exact) * std::sqrt(static_cast<double>(T)));
    EXPECT_GT(max_abs(reference.bias), 0.0);
  }
}

TEST_P(MoELayerTest, BackwardInSteps) {
  LayerRun layer(target(), layer_case());
  LayerRun steps(target(), layer_case(), {}, layer.backward_plan.minimum_bytes);
  layer.forward();
  layer.backward();
  steps.forward();
  steps.backward_in_steps();
  EXPECT_THAT(check_layer(steps), ::testing::IsEmpty());
  if (target().backend == "reference") return;  // it rounds what it hands on
  const auto same = [](const Tensor& a, const Tensor& b) {
    return bitwise_difference(a.values(), b.values());
  };
  if (layer.c.experts.deterministic) {
    EXPECT_EQ(same(layer.grad_x, steps.grad_x), "");
  }
  EXPECT_EQ(same(layer.grad_router_weight, steps.grad_router_weight), "");
  EXPECT_EQ(same(layer.grad_w1, steps.grad_w1), "");
  EXPECT_EQ(same(layer.grad_w2, steps.grad_w2), "");
  if (layer.c.router_bias) {
    EXPECT_EQ(same(layer.grad_router_bias, steps.grad_router_bias), "");
  }
}

// The router's share of dX is a product over rows too, with counters of its own.
TEST_P(MoELayerTest, SortedRowsAndCommonStartsChangeNoBit) {
  if (target().backend != "cuda") GTEST_SKIP() << "nothing else reads what this test forces";
  LayerCase wanted = layer_case();
  wanted.experts.hidden_size = 320;
  const auto run = [&](bool on) {
    const Forced forced({.block_n = 256, .sort_rows = on, .start_together = on});
    LayerRun layer(target(), wanted);
    for (int i = 0; i < 2; ++i) {
      layer.forward();
      layer.backward();
    }
    EXPECT_THAT(layer.violations(), ::testing::IsEmpty());
    return layer;
  };
  const LayerRun before = run(false), after = run(true);
  const auto same = [](const Tensor& a, const Tensor& b) {
    return bitwise_difference(a.values(), b.values());
  };
  if (wanted.experts.deterministic) {
    EXPECT_EQ(same(before.out, after.out), "");
    EXPECT_EQ(same(before.grad_x, after.grad_x), "");
  }
  EXPECT_EQ(same(before.grad_router_weight, after.grad_router_weight), "");
  EXPECT_EQ(same(before.grad_w1, after.grad_w1), "");
  EXPECT_EQ(same(before.grad_w2, after.grad_w2), "");
}

TEST_P(MoELayerTest, LimitsAndSharedDevicesChangeNoBit) {
  Target shared = target();
  shared.shared_device = true;
  LayerRun layer(target(), layer_case());
  LayerRun again(shared, layer_case(), layer.forward_plan.minimum_bytes,
                 layer.backward_plan.minimum_bytes);
  for (LayerRun* run : {&layer, &again}) {
    run->forward();
    run->backward();
    EXPECT_THAT(run->violations(), ::testing::IsEmpty());
  }
  if (target().backend == "cuda" && layer.c.experts.hidden_size > 256) {
    EXPECT_GT(again.backward_plan.num_slabs, 1);
  }
  const auto same = [](const Tensor& a, const Tensor& b) {
    return bitwise_difference(a.values(), b.values());
  };
  EXPECT_EQ(same(layer.out, again.out), "");
  if (layer.c.experts.deterministic) {
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
