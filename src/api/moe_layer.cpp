// Validation and dispatch of moe_layer_forward and moe_layer_backward.
#include "sonicmoe/moe_layer.hpp"

#include "api/arguments.hpp"
#include "api/checks.hpp"
#include "core/backend.hpp"
#include "layer/parts.hpp"

namespace sonicmoe {
namespace {

void check_layer_options(const Check& check, const MoELayerOptions& options,
                         std::int64_t num_experts) {
  check_expert_options(check, options.experts);
  check_router_options(check, options.router, num_experts);
}

// P of a router's T tokens over E experts.
std::int64_t pairs_of(const Check& check, const MoELayerOptions& options, const MoEShape& shape) {
  const std::int64_t top_k = options.router.top_k;
  if (!options.rounding) return shape.num_tokens * top_k;
  return checked_capacity(check, shape.num_tokens, shape.num_experts, top_k, *options.rounding);
}

MoEShape checked_shape(const Check& check, const MoELayerOptions& options, const ConstTensorView& x,
                       const ExpertWeights& weights) {
  check.rank("x", x, 2);
  check.dtype("x", x, {DType::kFloat32, DType::kBFloat16});
  check.rank("w2", weights.w2, 3);
  MoEShape shape;
  shape.num_tokens = x.size(0);
  shape.hidden_size = x.size(1);
  shape.num_experts = weights.w2.size(0);
  shape.intermediate_size = weights.w2.size(2);
  shape.activation = options.experts.activation;
  shape.deterministic = options.experts.deterministic;
  shape.max_rows = options.experts.max_rows;
  shape.numerics = Numerics::of(x.dtype());
  check.that(shape.hidden_size > 0, "x", "hidden_size > 0", x.describe());
  check.that(shape.num_experts > 0, "w2", "at least one expert", weights.w2.describe());
  check_layer_options(check, options, shape.num_experts);
  check_router_sizes(check, shape.num_tokens, shape.num_experts, options.router.top_k);
  shape.form = options.rounding ? MoEShape::Form::kPairs : MoEShape::Form::kTopK;
  shape.num_pairs = pairs_of(check, options, shape);
  check_shape(check, shape);
  return shape;
}

// What forward saved of the routing, under the names it has there.
void check_saved_routing(const Check& check, const MoELayerBackwardArgs& args,
                         const MoEShape& shape) {
  const auto vector = [&](const char* name, const ConstTensorView& view, DType dtype) {
    check.shape(name, view, {shape.num_pairs});
    check.dtype(name, view, {dtype});
    check.contiguous(name, view);
  };
  const auto matrix = [&](const char* name, const ConstTensorView& view, DType dtype) {
    check.shape(name, view, {shape.num_tokens, args.options.router.top_k});
    check.dtype(name, view, {dtype});
    check.contiguous(name, view);
  };
  matrix("topk_ids", args.saved.topk_ids, DType::kInt32);
  if (!args.options.rounding)
    return matrix("routing_weights", args.saved.routing_weights, DType::kFloat32);
  check_seed(check, *args.options.rounding);
  vector("token_ids", args.saved.token_ids, DType::kInt32);
  vector("expert_ids", args.saved.expert_ids, DType::kInt32);
  vector("routing_weights", args.saved.routing_weights, DType::kFloat32);
}

// A shape handed back by a caller, who may have changed it, against the options.
void check_planned(const Check& check, const MoELayerOptions& options, const MoEShape& shape) {
  check_shape(check, shape);
  check_layer_options(check, options, shape.num_experts);
  check.that((shape.form == MoEShape::Form::kPairs) == options.rounding.has_value() &&
                 shape.form != MoEShape::Form::kSorted,
             "form",
             options.rounding ? "pairs with token rounding" : "top-K without token rounding",
             std::to_string(static_cast<int>(shape.form)));
  const std::int64_t pairs = pairs_of(check, options, shape);
  check.that(shape.num_pairs == pairs, "num_pairs", std::to_string(pairs) + " with these options",
             std::to_string(shape.num_pairs));
  check.that(shape.max_rows == options.experts.max_rows, "max_rows", "that of these options",
             shape.max_rows ? std::to_string(*shape.max_rows) : "none");
}

MoEShape check_layer_forward(const Check& check, const MoELayerForwardArgs& args) {
  const MoEShape shape = checked_shape(check, args.options, args.x, args.weights);
  check_router(check, args.x, args.router_weight, args.router_bias, args.logits, shape.num_experts);
  if (args.options.rounding) {
    check_round_tokens_forward(check, round_tokens_args(args), "routing_weights");
  } else {
    check_route_forward(check, route_args(args), "routing_weights");
  }
  check.defined("rows_per_expert", args.rows_per_expert);
  check_moe_forward(check, expert_args(args));
  return shape;
}

void check_router_gradients(const Check& check, const MoELayerBackwardArgs& args) {
  if (args.grad_logits.defined()) {
    check.shape_like("grad_logits", args.grad_logits, args.logits);
    check.dtype("grad_logits", args.grad_logits, {DType::kFloat32});
    check.contiguous("grad_logits", args.grad_logits);
  }
  check_parameter_gradient(check, "grad_router_weight", args.grad_router_weight, args.router_weight,
                           args.accumulate);
  if (args.grad_router_weight.defined()) {
    check.unit_stride("grad_router_weight", args.grad_router_weight, 1);
  }
  check_router_bias_gradient(check, args.grad_router_bias, args.router_weight, args.accumulate);
}

// dS, and what else of the router only some steps take.
void check_router_step(const Check& check, const MoELayerBackwardArgs& args) {
  using enum BackwardStep;
  const bool input = does(args.step, kInput), ds = args.step == kHidden || args.step == kInput;
  const auto only = [&](bool takes, const char* name, const ConstTensorView& view) {
    check.that(takes || !view.defined(), name, "no tensor in this step", view.describe());
  };
  only(input, "grad_logits", args.grad_logits);
  only(input, "grad_router_weight", args.grad_router_weight);
  only(input, "grad_router_bias", args.grad_router_bias);
  only(ds, "grad_routing_weights", args.grad_routing_weights);
  if (!ds) return;
  check.shape_like("grad_routing_weights", args.grad_routing_weights, args.saved.routing_weights);
  check.dtype("grad_routing_weights", args.grad_routing_weights, {DType::kFloat32});
  check.contiguous("grad_routing_weights", args.grad_routing_weights);
}

MoEShape check_layer_backward(const Check& check, const MoELayerBackwardArgs& args) {
  const MoEShape shape = checked_shape(check, args.options, args.x, args.weights);
  check_router(check, args.x, args.router_weight, {}, args.logits, shape.num_experts);
  check_router_gradients(check, args);
  check_saved_routing(check, args, shape);
  check_moe_backward(check, expert_args(args));
  check_router_step(check, args);
  return shape;
}

}  // namespace

MoEShape moe_layer_shape(const MoELayerOptions& options, ConstTensorView x,
                         const ExpertWeights& weights) {
  return checked_shape(Check("moe_layer_shape", x.device()), options, x, weights);
}

WorkspacePlan moe_layer_forward_workspace(const Context& context, const MoELayerOptions& options,
                                          const MoEShape& shape, bool inference,
                                          std::optional<std::size_t> workspace_limit) {
  return answer("moe_layer_forward_workspace", context, [&](const Check& check) {
    check_planned(check, options, shape);
    const LayerPlan plan =
        choose_backend(context, check.operation())
            .plan_moe_layer_forward(context, options, shape, inference, workspace_limit);
    check_limit(check, plan.workspace, workspace_limit);
    return plan.workspace;
  });
}

WorkspacePlan moe_layer_backward_workspace(const Context& context, const MoELayerOptions& options,
                                           const MoEShape& shape,
                                           std::optional<std::size_t> workspace_limit,
                                           BackwardStep step) {
  return answer("moe_layer_backward_workspace", context, [&](const Check& check) {
    check_planned(check, options, shape);
    check_step(check, step);
    const LayerPlan plan =
        choose_backend(context, check.operation())
            .plan_moe_layer_backward(context, options, shape, workspace_limit, step);
    check_limit(check, plan.workspace, workspace_limit);
    return plan.workspace;
  });
}

void moe_layer_forward(const Context& context, const MoELayerForwardArgs& args) {
  run_operation("moe_layer_forward", context, [&](const Check& check) {
    const MoEShape shape = check_layer_forward(check, args);
    const Backend& backend = choose_backend(context, check.operation());
    backend.check_moe_forward(check, shape, expert_args(args));
    const LayerPlan plan = backend.plan_moe_layer_forward(
        context, args.options, shape, !args.saved.h.defined(), args.workspace_limit);
    check_workspace(check, plan.workspace, args.workspace, args.workspace_limit);
    check_memory(check, args);
    backend.moe_layer_forward(context, plan, args);
  });
}

void moe_layer_backward(const Context& context, const MoELayerBackwardArgs& args) {
  run_operation("moe_layer_backward", context, [&](const Check& check) {
    const MoEShape shape = check_layer_backward(check, args);
    const Backend& backend = choose_backend(context, check.operation());
    backend.check_moe_backward(check, shape, expert_args(args));
    check_row_lists(check, backend, shape, expert_args(args));
    const LayerPlan plan = backend.plan_moe_layer_backward(context, args.options, shape,
                                                           args.workspace_limit, args.step);
    check_workspace(check, plan.workspace, args.workspace, args.workspace_limit);
    check_memory(check, args);
    backend.moe_layer_backward(context, plan, args);
  });
}

}  // namespace sonicmoe
