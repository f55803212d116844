// moe_layer composes the router's and the experts' operations of one backend.
#include "sonicmoe/moe_layer.hpp"

#include <algorithm>

#include "api/moe_checks.hpp"
#include "core/backend.hpp"
#include "core/check.hpp"
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
WorkspacePlan plan_layer(const Backend& backend, const Context& context,
                         const MoELayerOptions& options, const MoEShape& shape, bool forward,
                         std::optional<std::size_t> limit, ExpertPlan expert_plan) {
  const std::size_t outer = carve(nullptr, backend, context, options, shape, forward, 0).used;
  if (limit) {
    const WorkspacePlan whole = expert_plan(std::nullopt);
    const std::size_t minimum = outer + whole.minimum_bytes;
    if (*limit < minimum) {
      throw Error("moe_layer", "workspace_limit", "at least " + std::to_string(minimum) + " bytes",
                  std::to_string(*limit));
    }
    *limit -= outer;
  }
  WorkspacePlan plan = expert_plan(limit);
  plan.bytes = carve(nullptr, backend, context, options, shape, forward, plan.bytes).used;
  plan.minimum_bytes += outer;
  return plan;
}

WorkspacePlan forward_plan(const Backend& backend, const Context& context,
                           const MoELayerOptions& options, const MoEShape& shape, bool inference,
                           std::optional<std::size_t> limit) {
  return plan_layer(backend, context, options, shape, true, limit, [&](auto expert_limit) {
    return backend.moe_forward_workspace(context, shape, inference, expert_limit);
  });
}

WorkspacePlan backward_plan(const Backend& backend, const Context& context,
                            const MoELayerOptions& options, const MoEShape& shape,
                            std::optional<std::size_t> limit) {
  return plan_layer(backend, context, options, shape, false, limit, [&](auto expert_limit) {
    return backend.moe_backward_workspace(context, shape, expert_limit);
  });
}

Routing routing_of(const MoELayerOptions& options, const MoELayerSaved& saved) {
  if (options.rounding) return PairRouting{saved.token_ids, saved.expert_ids, saved.pair_weights};
  return TopKRouting{saved.topk_ids, saved.pair_weights};
}

TensorView bytes_view(void* data, std::size_t bytes) {
  return TensorView(data, DType::kUInt8, {static_cast<std::int64_t>(bytes)});
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

// The expert half of the layer's backward, as moe_backward's arguments.
MoEBackwardArgs expert_args(const MoELayerBackwardArgs& args, const LayerWorkspace& workspace,
                            std::size_t expert_bytes, std::int64_t num_pairs,
                            std::optional<std::size_t> limit) {
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
  experts.workspace = bytes_view(workspace.experts, expert_bytes);
  experts.workspace_limit = limit;
  void* weights = workspace.grad_pair_weights;
  if (args.options.rounding) {
    experts.grad_routing_weights = TensorView(weights, DType::kFloat32, {num_pairs});
  } else {
    const ConstTensorView& ids = args.saved.topk_ids;
    experts.grad_routing_weights = TensorView(weights, DType::kFloat32, ids.shape());
  }
  return experts;
}

void check_router_gradient(const Check& check, const char* name, const ConstTensorView& grad,
                           const ConstTensorView& parameter, bool accumulate) {
  if (!grad.defined()) return;
  check.shape_like(name, grad, parameter);
  if (accumulate) check.dtype(name, grad, {DType::kFloat32});
  check.dtype(name, grad, {parameter.dtype(), DType::kFloat32});
  check.unit_stride(name, grad, grad.rank() - 1);
}

}  // namespace

MoEShape moe_layer_shape(const MoELayerOptions& options, ConstTensorView x,
                         const ExpertWeights& weights) {
  const Check check("moe_layer_shape");
  check.rank("x", x, 2);
  check.rank("w2", weights.w2, 3);
  MoEShape shape;
  shape.num_tokens = x.size(0);
  shape.hidden_size = x.size(1);
  shape.num_experts = weights.w2.size(0);
  shape.intermediate_size = weights.w2.size(2);
  shape.activation = options.experts.activation;
  shape.deterministic = options.experts.deterministic;
  shape.dtype = x.dtype();
  check.that(options.router.top_k >= 1 && options.router.top_k <= shape.num_experts, "top_k",
             "1.." + std::to_string(shape.num_experts), std::to_string(options.router.top_k));
  shape.form = options.rounding ? MoEShape::Form::kPairs : MoEShape::Form::kTopK;
  shape.num_pairs = options.rounding ? rounded_capacity(shape.num_tokens, shape.num_experts,
                                                        options.router.top_k, *options.rounding)
                                     : shape.num_tokens * options.router.top_k;
  return shape;
}

WorkspacePlan moe_layer_forward_workspace(const Context& context, const MoELayerOptions& options,
                                          const MoEShape& shape, bool inference,
                                          std::optional<std::size_t> workspace_limit) {
  return forward_plan(choose_backend(context, "moe_layer_forward_workspace"), context, options,
                      shape, inference, workspace_limit);
}

WorkspacePlan moe_layer_backward_workspace(const Context& context, const MoELayerOptions& options,
                                           const MoEShape& shape,
                                           std::optional<std::size_t> workspace_limit) {
  return backward_plan(choose_backend(context, "moe_layer_backward_workspace"), context, options,
                       shape, workspace_limit);
}

void moe_layer_forward(const Context& context, const MoELayerForwardArgs& args) {
  const Check check("moe_layer_forward");
  const MoEShape shape = moe_layer_shape(args.options, args.x, args.weights);
  check_router(check, args.x, args.router_weight, args.router_bias, args.logits, shape.num_experts);
  const Backend& backend = choose_backend(context, "moe_layer_forward");
  Context forced = context;
  forced.backend = backend.name();
  const bool inference = !args.saved.h.defined();
  const WorkspacePlan plan =
      forward_plan(backend, context, args.options, shape, inference, args.workspace_limit);
  check.buffer("workspace", args.workspace, plan.bytes, WorkspaceCarver::kAlignment);
  const std::size_t outer = carve(nullptr, backend, context, args.options, shape, true, 0).used;
  const LayerWorkspace workspace =
      carve(args.workspace.data(), backend, context, args.options, shape, true, plan.bytes - outer);

  const TensorView router_scratch = bytes_view(workspace.router, workspace.router_bytes);
  backend.router_logits(context, args.x, args.router_weight, args.router_bias, args.logits,
                        router_scratch);
  if (args.options.rounding) {
    RoundTokensForwardArgs round;
    round.options = args.options.router;
    round.rounding = *args.options.rounding;
    round.logits = args.logits;
    round.token_ids = args.saved.token_ids;
    round.expert_ids = args.saved.expert_ids;
    round.pair_weights = args.saved.pair_weights;
    round.topk_ids = args.saved.topk_ids;
    round.rows_per_expert = args.rows_per_expert;
    round.workspace = router_scratch;
    round_tokens_forward(forced, round);
  } else {
    route_forward(forced, {args.options.router, args.logits, args.saved.topk_ids,
                           args.saved.pair_weights, args.rows_per_expert});
  }

  MoEForwardArgs experts;
  experts.options = args.options.experts;
  experts.x = args.x;
  experts.weights = args.weights;
  experts.routing = routing_of(args.options, args.saved);
  experts.out = args.out;
  experts.h = args.saved.h;
  experts.metadata = args.saved.metadata;
  experts.workspace = bytes_view(workspace.experts, plan.bytes - outer);
  if (args.workspace_limit) experts.workspace_limit = *args.workspace_limit - outer;
  moe_forward(forced, experts);
}

void moe_layer_backward(const Context& context, const MoELayerBackwardArgs& args) {
  const Check check("moe_layer_backward");
  const MoEShape shape = moe_layer_shape(args.options, args.x, args.weights);
  check_router(check, args.x, args.router_weight, {}, args.logits, shape.num_experts);
  if (args.grad_logits.defined()) {
    check.shape_like("grad_logits", args.grad_logits, args.logits);
    check.dtype("grad_logits", args.grad_logits, {DType::kFloat32});
    check.contiguous("grad_logits", args.grad_logits);
  }
  check_router_gradient(check, "grad_router_weight", args.grad_router_weight, args.router_weight,
                        args.accumulate);
  const Backend& backend = choose_backend(context, "moe_layer_backward");
  Context forced = context;
  forced.backend = backend.name();
  const WorkspacePlan plan =
      backward_plan(backend, context, args.options, shape, args.workspace_limit);
  check.buffer("workspace", args.workspace, plan.bytes, WorkspaceCarver::kAlignment);
  const std::size_t outer = carve(nullptr, backend, context, args.options, shape, false, 0).used;
  const LayerWorkspace workspace = carve(args.workspace.data(), backend, context, args.options,
                                         shape, false, plan.bytes - outer);
  std::optional<std::size_t> limit;
  if (args.workspace_limit) limit = *args.workspace_limit - outer;
  const MoEBackwardArgs experts =
      expert_args(args, workspace, plan.bytes - outer, shape.num_pairs, limit);
  check_moe_backward(check, experts);

  const TensorView grad_logits(workspace.grad_logits, DType::kFloat32, args.logits.shape());
  const RouteBackwardArgs topk{args.options.router, args.logits, args.saved.topk_ids,
                               experts.grad_routing_weights, grad_logits};
  const RoundTokensBackwardArgs rounding{
      args.options.router,  args.logits,           args.saved.topk_ids,
      args.saved.token_ids, args.saved.expert_ids, experts.grad_routing_weights,
      grad_logits};
  RouterShare router;
  if (args.options.rounding) {
    check_round_tokens_backward(rounding);
    router.rounding = &rounding;
  } else {
    check_route_backward(topk);
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
  backend.router_logits_backward(context, args.x, router.grad_logits, args.grad_router_weight,
                                 args.grad_router_bias, args.accumulate,
                                 bytes_view(workspace.router, workspace.router_bytes));
}

}  // namespace sonicmoe
