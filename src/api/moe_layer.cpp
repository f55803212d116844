// moe_layer composes the router's and the experts' operations of one backend.
#include "sonicmoe/moe_layer.hpp"

#include <algorithm>

#include "api/arguments.hpp"
#include "api/checks.hpp"
#include "core/backend.hpp"
#include "core/workspace.hpp"

namespace sonicmoe {
namespace {

// Scratch of the layer: the router's part first, then the experts' (whose plan obeys the limit that
// is left). Computed with a null base, carved with the caller's.
struct LayerWorkspace {
  std::size_t router_bytes = 0;
  void* grad_pair_weights = nullptr;  // backward: [P] float32
  void* grad_logits = nullptr;        // backward: [T, E] float32
  void* router = nullptr;             // GEMM panels, or token rounding's keys
  void* experts = nullptr;
  std::size_t used = 0;
};

std::size_t pairs_bytes(const MoEShape& shape) {
  return static_cast<std::size_t>(shape.num_pairs) * sizeof(float);
}

std::size_t logits_bytes(const MoEShape& shape) {
  return static_cast<std::size_t>(shape.num_tokens * shape.num_experts) * sizeof(float);
}

std::size_t router_scratch(const Backend& backend, const Context& context,
                           const MoELayerOptions& options, const MoEShape& shape, bool forward) {
  std::size_t bytes = backend.router_logits_workspace_bytes(context, shape);
  if (forward && options.rounding) {
    bytes =
        std::max(bytes, backend.round_tokens_workspace_bytes(
                            context, shape.num_tokens, shape.num_experts, options.router.top_k));
  }
  return bytes;
}

LayerWorkspace carve(void* base, const Backend& backend, const Context& context,
                     const MoELayerOptions& options, const MoEShape& shape, bool forward,
                     std::size_t expert_bytes) {
  WorkspaceCarver carver(base);
  LayerWorkspace w;
  if (!forward) {
    w.grad_pair_weights = carver.take_bytes(pairs_bytes(shape));
    w.grad_logits = carver.take_bytes(logits_bytes(shape));
  }
  w.router_bytes = router_scratch(backend, context, options, shape, forward);
  w.router = carver.take_bytes(w.router_bytes);
  w.experts = carver.take_bytes(expert_bytes);
  w.used = carver.used();
  return w;
}

template <class ExpertPlan>
WorkspacePlan plan_layer(const Check& check, const Backend& backend, const Context& context,
                         const MoELayerOptions& options, const MoEShape& shape, bool forward,
                         std::optional<std::size_t> limit, ExpertPlan expert_plan) {
  const std::size_t outer = carve(nullptr, backend, context, options, shape, forward, 0).used;
  if (limit) {
    const WorkspacePlan whole = expert_plan(std::nullopt);
    const std::size_t minimum = outer + whole.minimum_bytes;
    if (*limit < minimum) {
      check.fail("workspace_limit", "at least " + std::to_string(minimum) + " bytes",
                 std::to_string(*limit));
    }
    *limit -= outer;
  }
  WorkspacePlan plan = expert_plan(limit);
  plan.bytes = carve(nullptr, backend, context, options, shape, forward, plan.bytes).used;
  plan.minimum_bytes += outer;
  return plan;
}

WorkspacePlan forward_plan(const Check& check, const Backend& backend, const Context& context,
                           const MoELayerOptions& options, const MoEShape& shape, bool inference,
                           std::optional<std::size_t> limit) {
  return plan_layer(check, backend, context, options, shape, true, limit, [&](auto expert_limit) {
    return backend.moe_forward_workspace(context, shape, inference, expert_limit);
  });
}

WorkspacePlan backward_plan(const Check& check, const Backend& backend, const Context& context,
                            const MoELayerOptions& options, const MoEShape& shape,
                            std::optional<std::size_t> limit) {
  return plan_layer(check, backend, context, options, shape, false, limit, [&](auto expert_limit) {
    return backend.moe_backward_workspace(context, shape, expert_limit);
  });
}

Routing routing_of(const MoELayerOptions& options, const MoELayerSaved& saved) {
  if (options.rounding) return PairRouting{saved.token_ids, saved.expert_ids, saved.pair_weights};
  return TopKRouting{saved.topk_ids, saved.pair_weights};
}

TensorView bytes_view(void* data, std::size_t bytes, const Device& device) {
  return TensorView(data, DType::kUInt8, {static_cast<std::int64_t>(bytes)}, device);
}

void check_router(const Check& check, const ConstTensorView& x, const ConstTensorView& weight,
                  const ConstTensorView& bias, const ConstTensorView& logits,
                  std::int64_t num_experts) {
  check.rank("x", x, 2);
  check.shape("router_weight", weight, {num_experts, x.size(1)});
  check.dtype("router_weight", weight, {x.dtype(), DType::kFloat32});
  check.unit_stride("router_weight", weight, 1);
  if (bias.defined()) {
    check.shape("router_bias", bias, {num_experts});
    check.dtype("router_bias", bias, {weight.dtype(), DType::kFloat32});
    check.unit_stride("router_bias", bias, 0);
  }
  check.shape("logits", logits, {x.size(0), num_experts});
  check.dtype("logits", logits, {DType::kFloat32});
  check.contiguous("logits", logits);
}

RouteForwardArgs topk_args(const MoELayerForwardArgs& args) {
  return {args.options.router, args.logits, args.saved.topk_ids, args.saved.pair_weights,
          args.rows_per_expert};
}

RoundTokensForwardArgs rounding_args(const MoELayerForwardArgs& args) {
  return {.options = args.options.router,
          .rounding = *args.options.rounding,
          .logits = args.logits,
          .token_ids = args.saved.token_ids,
          .expert_ids = args.saved.expert_ids,
          .pair_weights = args.saved.pair_weights,
          .topk_ids = args.saved.topk_ids,
          .rows_per_expert = args.rows_per_expert,
          .rows_per_expert_before = {},
          .workspace = {}};
}

// The expert half of the layer's forward, without its workspace.
MoEForwardArgs expert_args(const MoELayerForwardArgs& args) {
  return {.options = args.options.experts,
          .x = args.x,
          .weights = args.weights,
          .routing = routing_of(args.options, args.saved),
          .out = args.out,
          .h = args.saved.h,
          .metadata = args.saved.metadata,
          .workspace = {},
          .workspace_limit = {}};
}

// The expert half of the layer's backward, as moe_backward's arguments.
MoEBackwardArgs expert_args(const MoELayerBackwardArgs& args, const LayerWorkspace& workspace,
                            std::size_t expert_bytes, std::int64_t num_pairs,
                            std::optional<std::size_t> limit) {
  const Device device = args.x.device();
  MoEBackwardArgs experts;
  experts.options = args.options.experts;
  experts.grad_out = args.grad_out;
  experts.x = args.x;
  experts.weights = args.weights;
  experts.routing = routing_of(args.options, args.saved);
  experts.h = args.saved.h;
  experts.metadata = args.saved.metadata;
  experts.grad_x = args.grad_x;
  experts.grad_w1 = args.grad_w1;
  experts.grad_b1 = args.grad_b1;
  experts.grad_w2 = args.grad_w2;
  experts.grad_b2 = args.grad_b2;
  experts.accumulate = args.accumulate;
  experts.workspace = bytes_view(workspace.experts, expert_bytes, device);
  experts.workspace_limit = limit;
  void* weights = workspace.grad_pair_weights;
  if (args.options.rounding) {
    experts.grad_routing_weights = TensorView(weights, DType::kFloat32, {num_pairs}, device);
  } else {
    const ConstTensorView& ids = args.saved.topk_ids;
    experts.grad_routing_weights = TensorView(weights, DType::kFloat32, ids.shape(), device);
  }
  return experts;
}

// The gradient of a bias that backward does not see: of its weight's dtype or float32.
void check_router_bias_gradient(const Check& check, const ConstTensorView& grad,
                                const ConstTensorView& weight, bool accumulate) {
  if (!grad.defined()) return;
  check.shape("grad_router_bias", grad, {weight.size(0)});
  if (accumulate) check.dtype("grad_router_bias", grad, {DType::kFloat32});
  check.dtype("grad_router_bias", grad, {weight.dtype(), DType::kFloat32});
  check.unit_stride("grad_router_bias", grad, 0);
}

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
    return matrix("pair_weights", args.saved.pair_weights, DType::kFloat32);
  check_seed(check, *args.options.rounding);
  vector("token_ids", args.saved.token_ids, DType::kInt32);
  vector("expert_ids", args.saved.expert_ids, DType::kInt32);
  vector("pair_weights", args.saved.pair_weights, DType::kFloat32);
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
}

void layer_forward(const Check& check, const Context& context, const MoELayerForwardArgs& args) {
  const MoEShape shape = checked_shape(check, args.options, args.x, args.weights);
  check_router(check, args.x, args.router_weight, args.router_bias, args.logits, shape.num_experts);
  if (args.options.rounding) {
    check_round_tokens_forward(check, rounding_args(args));
  } else {
    check_route_forward(check, topk_args(args), "pair_weights");
  }
  check.defined("rows_per_expert", args.rows_per_expert);
  MoEForwardArgs experts = expert_args(args);
  check_moe_forward(check, experts);

  const Backend& backend = choose_backend(context, check.operation());
  backend.check_moe_forward(check, shape, experts);
  const WorkspacePlan plan = forward_plan(check, backend, context, args.options, shape,
                                          !args.saved.h.defined(), args.workspace_limit);
  check.buffer("workspace", args.workspace, plan.bytes, WorkspaceCarver::kAlignment);
  check_memory(check, args);
  const std::size_t outer = carve(nullptr, backend, context, args.options, shape, true, 0).used;
  const LayerWorkspace workspace =
      carve(args.workspace.data(), backend, context, args.options, shape, true, plan.bytes - outer);

  const TensorView router_scratch =
      bytes_view(workspace.router, workspace.router_bytes, context.device);
  experts.workspace = bytes_view(workspace.experts, plan.bytes - outer, context.device);
  if (args.workspace_limit) experts.workspace_limit = *args.workspace_limit - outer;
  backend.router_logits(context, args.x, args.router_weight, args.router_bias, args.logits,
                        router_scratch);
  if (args.options.rounding) {
    RoundTokensForwardArgs round = rounding_args(args);
    round.workspace = router_scratch;
    backend.round_tokens_forward(context, round);
  } else {
    backend.route_forward(context, topk_args(args));
  }
  backend.moe_forward(context, shape, experts);
}

void layer_backward(const Check& check, const Context& context, const MoELayerBackwardArgs& args) {
  const MoEShape shape = checked_shape(check, args.options, args.x, args.weights);
  check_router(check, args.x, args.router_weight, {}, args.logits, shape.num_experts);
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
  const Backend& backend = choose_backend(context, check.operation());
  const WorkspacePlan plan =
      backward_plan(check, backend, context, args.options, shape, args.workspace_limit);
  check.buffer("workspace", args.workspace, plan.bytes, WorkspaceCarver::kAlignment);
  const std::size_t outer = carve(nullptr, backend, context, args.options, shape, false, 0).used;
  const LayerWorkspace workspace = carve(args.workspace.data(), backend, context, args.options,
                                         shape, false, plan.bytes - outer);
  std::optional<std::size_t> limit;
  if (args.workspace_limit) limit = *args.workspace_limit - outer;
  const TensorView grad_logits(workspace.grad_logits, DType::kFloat32, args.logits.shape(),
                               context.device);
  check_saved_routing(check, args, shape);
  const MoEBackwardArgs experts =
      expert_args(args, workspace, plan.bytes - outer, shape.num_pairs, limit);
  check_moe_backward(check, experts);
  backend.check_moe_backward(check, shape, experts);
  check_memory(check, args);

  const RouteBackwardArgs topk{args.options.router, args.logits, args.saved.topk_ids,
                               experts.grad_routing_weights, grad_logits};
  const RoundTokensBackwardArgs rounding{
      args.options.router,  args.logits,           args.saved.topk_ids,
      args.saved.token_ids, args.saved.expert_ids, experts.grad_routing_weights,
      grad_logits};
  RouterShare router;
  if (args.options.rounding) {
    router.rounding = &rounding;
  } else {
    router.topk = &topk;
  }
  router.addend = args.grad_logits;
  router.grad_logits = grad_logits;
  router.router_weight = args.router_weight;
  router.compute_grad_logits = [&] {
    if (args.options.rounding) {
      backend.round_tokens_backward(context, rounding);
    } else {
      backend.route_backward(context, topk);
    }
    if (args.grad_logits.defined()) {
      backend.add_logits_gradient(context, grad_logits, args.grad_logits);
    }
  };
  backend.moe_backward(context, shape, experts, &router);
  backend.router_logits_backward(
      context, args.x, router.grad_logits, args.grad_router_weight, args.grad_router_bias,
      args.accumulate, bytes_view(workspace.router, workspace.router_bytes, context.device));
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
    return forward_plan(check, choose_backend(context, check.operation()), context, options, shape,
                        inference, workspace_limit);
  });
}

WorkspacePlan moe_layer_backward_workspace(const Context& context, const MoELayerOptions& options,
                                           const MoEShape& shape,
                                           std::optional<std::size_t> workspace_limit) {
  return answer("moe_layer_backward_workspace", context, [&](const Check& check) {
    check_planned(check, options, shape);
    return backward_plan(check, choose_backend(context, check.operation()), context, options, shape,
                         workspace_limit);
  });
}

void moe_layer_forward(const Context& context, const MoELayerForwardArgs& args) {
  run_operation("moe_layer_forward", context,
                [&](const Check& check) { layer_forward(check, context, args); });
}

void moe_layer_backward(const Context& context, const MoELayerBackwardArgs& args) {
  run_operation("moe_layer_backward", context,
                [&](const Check& check) { layer_backward(check, context, args); });
}

}  // namespace sonicmoe
