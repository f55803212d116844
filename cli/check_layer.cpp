// moe_layer_forward and moe_layer_backward: router and experts as one operation, against the parts
// run one after another on the reference.
#include <algorithm>
#include <cmath>
#include <optional>

#include "cli/check.hpp"
#include "cli/experts.hpp"
#include "sonicmoe/moe_layer.hpp"

namespace sonicmoe::cli {
namespace {

using Form = MoEShape::Form;

struct LayerCase {
  MoELayerOptions options;
  ExpertsConfig config;

  LayerCase(Device device, Random& random) {
    config.num_tokens = random.integer(1, 64);
    config.hidden_size = random.integer(1, 64);
    config.intermediate_size = random.integer(1, 48);
    config.num_experts = random.integer(1, 12);
    config.dtype = random.chance(0.5) ? DType::kFloat32 : DType::kBFloat16;
    config.fit(device);
    if (config.dtype == DType::kBFloat16) {
      // As in check_experts.cpp; the router's bias has one gradient per expert.
      config.hidden_size = std::max<std::int64_t>(config.hidden_size, 8);
      config.intermediate_size = std::max<std::int64_t>(config.intermediate_size, 8);
      config.num_experts = std::max<std::int64_t>(config.num_experts, 4);
    }
    config.top_k = random.integer(1, std::min<std::int64_t>(config.num_experts, 4));
    config.biases = random.chance(0.3);
    config.options.activation = random.chance(0.7) ? Activation::kSwiGLU : Activation::kGELU;
    options.experts = config.options;
    options.router.top_k = config.top_k;
    options.router.scoring = static_cast<Scoring>(random.integer(0, 2));
    if (random.chance(0.5)) {
      options.rounding.emplace();
      options.rounding->tile = random.integer(1, std::min<std::int64_t>(config.num_tokens, 16));
      options.rounding->policy = static_cast<RoundingPolicy>(random.integer(0, 5));
      options.rounding->seed = random.next();
      config.form = Form::kPairs;
      config.num_pairs =
          rounded_capacity(config.num_tokens, config.num_experts, config.top_k, *options.rounding);
    }
  }

  std::string to_string() const {
    return "layer " + config.to_string() + " " + std::string(name_of(options.router.scoring)) +
           (options.rounding ? " " + std::string(name_of(options.rounding->policy)) +
                                   " tile=" + std::to_string(options.rounding->tile)
                             : "");
  }
};

// All tensors of one run of the layer, on one device.
struct LayerRun {
  const LayerCase& c;
  ExpertsInputs inputs;
  Tensor router_weight, router_bias, grad_logits_in;
  Tensor out, logits, counts, topk_ids, token_ids, expert_ids, pair_weights, h, metadata, workspace;
  Tensor grad_x, grad_router_weight, grad_router_bias, grad_w1, grad_b1, grad_w2, grad_b2;

  LayerRun(Device device, const LayerCase& layer_case, const ExpertsInputs& experts, Random& random)
      : c(layer_case), inputs(experts.to(device)) {
    make_router(device, random);
    make_results(device);
  }

  LayerRun to_host() const {
    LayerRun copy = *this;
    copy.inputs = inputs.to(Device{});
    for (Tensor* tensor : {&copy.router_weight,
                           &copy.router_bias,
                           &copy.grad_logits_in,
                           &copy.out,
                           &copy.logits,
                           &copy.counts,
                           &copy.topk_ids,
                           &copy.token_ids,
                           &copy.expert_ids,
                           &copy.pair_weights,
                           &copy.h,
                           &copy.metadata,
                           &copy.workspace,
                           &copy.grad_x,
                           &copy.grad_router_weight,
                           &copy.grad_router_bias,
                           &copy.grad_w1,
                           &copy.grad_b1,
                           &copy.grad_w2,
                           &copy.grad_b2}) {
      *tensor = tensor->to_host();
    }
    return copy;
  }

  void make_router(Device device, Random& random) {
    const ExpertsConfig& f = c.config;
    const std::int64_t T = f.num_tokens, d = f.hidden_size, E = f.num_experts;
    const DType router_dtype = random.chance(0.5) ? f.dtype : DType::kFloat32;
    router_weight = Tensor(router_dtype, {E, d}, device);
    router_weight.fill_random(random, 1.0 / std::sqrt(static_cast<double>(d)));
    if (random.chance(0.3)) {
      router_bias = Tensor(router_dtype, {E}, device);
      router_bias.fill_random(random, 0.3);
      grad_router_bias = Tensor(DType::kFloat32, {E}, device);
    }
    if (random.chance(0.5)) {
      grad_logits_in = Tensor(DType::kFloat32, {T, E}, device);
      grad_logits_in.fill_random(random, 0.1);
    }
  }

  void make_results(Device device) {
    const ExpertsConfig& f = c.config;
    const std::int64_t T = f.num_tokens, d = f.hidden_size, E = f.num_experts;
    const MoEShape shape = moe_layer_shape(c.options, inputs.x.view(), inputs.weights());
    const auto make = [&](DType dtype, std::vector<std::int64_t> extents) {
      return Tensor(dtype, std::move(extents), device);
    };
    out = make(f.dtype, {T, d});
    logits = make(DType::kFloat32, {T, E});
    counts = make(DType::kInt32, {E});
    topk_ids = make(DType::kInt32, {T, f.top_k});
    if (c.options.rounding) {
      token_ids = make(DType::kInt32, {shape.num_pairs});
      expert_ids = make(DType::kInt32, {shape.num_pairs});
      pair_weights = make(DType::kFloat32, {shape.num_pairs});
    } else {
      pair_weights = make(DType::kFloat32, {T, f.top_k});
    }
    h = make(f.dtype, {shape.num_pairs, shape.h_columns()});
    metadata = make(DType::kUInt8, {static_cast<std::int64_t>(moe_metadata_bytes(shape))});
    grad_x = make(f.dtype, {T, d});
    grad_router_weight = make(DType::kFloat32, {E, d});
    grad_w1 = make(f.dtype, {E, shape.h_columns(), d});
    grad_w2 = make(f.dtype, {E, d, f.intermediate_size});
    if (f.biases) {
      grad_b1 = make(f.dtype, {E, shape.h_columns()});
      grad_b2 = make(f.dtype, {E, d});
    }
  }

  MoELayerSaved saved() const {
    return {topk_ids.view(),     token_ids.view(), expert_ids.view(),
            pair_weights.view(), h.view(),         metadata.view()};
  }

  void forward(const Context& context) {
    const MoEShape shape = moe_layer_shape(c.options, inputs.x.view(), inputs.weights());
    const auto plan = moe_layer_forward_workspace(context, c.options, shape);
    workspace = Tensor(DType::kUInt8, {static_cast<std::int64_t>(plan.bytes)}, context.device);
    MoELayerForwardArgs args;
    args.options = c.options;
    args.x = inputs.x.view();
    args.router_weight = router_weight.view();
    args.router_bias = router_bias.view();
    args.weights = inputs.weights();
    args.out = out.view();
    args.logits = logits.view();
    args.rows_per_expert = counts.view();
    args.saved = saved();
    args.workspace = workspace.view();
    moe_layer_forward(context, args);
  }

  void backward(const Context& context) {
    const MoEShape shape = moe_layer_shape(c.options, inputs.x.view(), inputs.weights());
    const auto plan = moe_layer_backward_workspace(context, c.options, shape);
    workspace = Tensor(DType::kUInt8, {static_cast<std::int64_t>(plan.bytes)}, context.device);
    MoELayerBackwardArgs args;
    args.options = c.options;
    args.grad_out = inputs.grad_out.view();
    args.grad_logits = grad_logits_in.view();
    args.x = inputs.x.view();
    args.router_weight = router_weight.view();
    args.weights = inputs.weights();
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
    moe_layer_backward(context, args);
  }
};

// X Wr^T + bias in float64. `run` on the host, as in all that follows unless it says otherwise.
Tensor expected_logits(const LayerRun& run) {
  const auto T = static_cast<std::size_t>(run.c.config.num_tokens);
  const auto E = static_cast<std::size_t>(run.c.config.num_experts);
  const auto d = static_cast<std::size_t>(run.c.config.hidden_size);
  Tensor logits(DType::kFloat32, {run.c.config.num_tokens, run.c.config.num_experts});
  for (std::size_t t = 0; t < T; ++t) {
    for (std::size_t e = 0; e < E; ++e) {
      double sum = run.router_bias.defined() ? static_cast<double>(run.router_bias.at(e)) : 0.0;
      for (std::size_t k = 0; k < d; ++k) {
        sum += static_cast<double>(run.inputs.x.at(t * d + k)) *
               static_cast<double>(run.router_weight.at(e * d + k));
      }
      logits.set(t * E + e, static_cast<float>(sum));
    }
  }
  return logits;
}

// The layer's routing is what the routing operation makes of the layer's logits. `run` on the
// context's device.
void compare_routing(Findings& findings, const Context& context, const LayerRun& run) {
  const ExpertsConfig& f = run.c.config;
  const auto make = [&](DType dtype, std::vector<std::int64_t> extents) {
    return Tensor(dtype, std::move(extents), context.device);
  };
  const Tensor ids = make(DType::kInt32, {f.num_tokens, f.top_k});
  const Tensor counts = make(DType::kInt32, {f.num_experts});
  if (!run.c.options.rounding) {
    const Tensor weights = make(DType::kFloat32, {f.num_tokens, f.top_k});
    route_forward(context, {run.c.options.router, run.logits.view(), ids.view(), weights.view(),
                            counts.view()});
    findings.same_bits("topk_ids", run.topk_ids, ids);
    findings.same_bits("topk_weights", run.pair_weights, weights);
  } else {
    const Tensor tokens = make(DType::kInt32, {f.num_pairs});
    const Tensor experts = make(DType::kInt32, {f.num_pairs});
    const Tensor weights = make(DType::kFloat32, {f.num_pairs});
    const Tensor scratch =
        make(DType::kUInt8, {static_cast<std::int64_t>(round_tokens_workspace_bytes(
                                context, f.num_tokens, f.num_experts, f.top_k))});
    RoundTokensForwardArgs args;
    args.options = run.c.options.router;
    args.rounding = *run.c.options.rounding;
    args.logits = run.logits.view();
    args.token_ids = tokens.view();
    args.expert_ids = experts.view();
    args.pair_weights = weights.view();
    args.topk_ids = ids.view();
    args.rows_per_expert = counts.view();
    args.workspace = scratch.view();
    round_tokens_forward(context, args);
    findings.same_bits("token_ids", run.token_ids, tokens);
    findings.same_bits("expert_ids", run.expert_ids, experts);
    findings.same_bits("pair_weights", run.pair_weights, weights);
  }
  findings.same_bits("rows_per_expert", run.counts, counts);
}

// d logits: the routing weights' share through the scoring function plus what was handed in.
Tensor expected_grad_logits(const LayerRun& run, const Tensor& grad_weights) {
  const ExpertsConfig& f = run.c.config;
  Tensor grad(DType::kFloat32, {f.num_tokens, f.num_experts});
  if (run.c.options.rounding) {
    round_tokens_backward(
        reference_context(),
        {run.c.options.router, run.logits.view(), run.topk_ids.view(), run.token_ids.view(),
         run.expert_ids.view(), grad_weights.view(), grad.view()});
  } else {
    route_backward(reference_context(), {run.c.options.router, run.logits.view(),
                                         run.topk_ids.view(), grad_weights.view(), grad.view()});
  }
  if (run.grad_logits_in.defined()) {
    for (std::size_t i = 0; i < grad.count(); ++i)
      grad.set(i, grad.at(i) + run.grad_logits_in.at(i));
  }
  return grad;
}

// Adds the router's share to `grad_x` and compares the router's own gradients.
void compare_router_gradients(Findings& findings, const LayerRun& run, const Tensor& grad_logits,
                              Tensor& grad_x, const Tolerance& tolerance) {
  const auto T = static_cast<std::size_t>(run.c.config.num_tokens);
  const auto E = static_cast<std::size_t>(run.c.config.num_experts);
  const auto d = static_cast<std::size_t>(run.c.config.hidden_size);
  std::vector<double> weight(E * d, 0.0), bias(E, 0.0), x(T * d, 0.0);
  for (std::size_t t = 0; t < T; ++t) {
    for (std::size_t e = 0; e < E; ++e) {
      const double g = grad_logits.at(t * E + e);
      bias[e] += g;
      for (std::size_t k = 0; k < d; ++k) {
        weight[e * d + k] += g * static_cast<double>(run.inputs.x.at(t * d + k));
        x[t * d + k] += g * static_cast<double>(run.router_weight.at(e * d + k));
      }
    }
  }
  for (std::size_t i = 0; i < x.size(); ++i) {
    grad_x.set(i, static_cast<float>(grad_x.at(i) + x[i]));
  }
  const auto to_tensor = [](const std::vector<double>& values) {
    Tensor tensor(DType::kFloat32, {static_cast<std::int64_t>(values.size())});
    for (std::size_t i = 0; i < values.size(); ++i) tensor.set(i, static_cast<float>(values[i]));
    return tensor;
  };
  findings.compare("grad_router_weight", run.grad_router_weight, to_tensor(weight), tolerance,
                   true);
  if (run.grad_router_bias.defined()) {
    findings.compare("grad_router_bias", run.grad_router_bias, to_tensor(bias), tolerance, true);
  }
}

// The layer's inputs in float32 with the routing it has chosen.
ExpertsInputs reference_inputs(const LayerRun& run) {
  ExpertsInputs reference = run.inputs.to_float32();
  if (run.c.options.rounding) {
    reference.token_ids = run.token_ids;
    reference.expert_ids = run.expert_ids;
    reference.pair_weights = run.pair_weights;
  } else {
    reference.topk_ids = run.topk_ids;
    reference.topk_weights = run.pair_weights;
  }
  return reference;
}

}  // namespace

Findings check_moe_layer(const Context& context, Random& random) {
  const LayerCase c(context.device, random);
  const ExpertsInputs inputs(c.config, random);
  Findings findings;
  findings.description = c.to_string();
  LayerRun run(context.device, c, inputs, random);
  run.forward(context);
  findings.compare("logits", run.logits, expected_logits(run.to_host()),
                   Tolerance::of(DType::kFloat32), true);
  compare_routing(findings, context, run);
  if (!findings.passed()) return findings;

  const ExpertsInputs experts = reference_inputs(run.to_host());
  const bool may_vanish = experts.num_rows() == 0;
  const Context reference = reference_context();
  ExpertsRun expected(reference, experts);
  expected.forward(reference);
  const Tolerance tolerance = Tolerance::of(c.config.dtype);
  findings.compare("out", run.out, expected.out, tolerance, may_vanish);
  run.backward(context);
  expected.h.copy_from(run.h);
  expected.backward(reference);
  const LayerRun results = run.to_host();
  const Tensor grad_logits = expected_grad_logits(results, expected.grad_routing_weights);
  compare_router_gradients(findings, results, grad_logits, expected.grad_x, tolerance);
  findings.compare("grad_x", run.grad_x, expected.grad_x, tolerance, may_vanish);
  findings.compare("grad_w1", run.grad_w1, expected.grad_w1, tolerance, may_vanish);
  findings.compare("grad_w2", run.grad_w2, expected.grad_w2, tolerance, may_vanish);
  if (c.config.biases) {
    findings.compare("grad_b1", run.grad_b1, expected.grad_b1, tolerance, may_vanish);
    findings.compare("grad_b2", run.grad_b2, expected.grad_b2, tolerance, may_vanish);
  }
  return findings;
}

}  // namespace sonicmoe::cli
