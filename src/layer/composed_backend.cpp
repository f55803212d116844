#include "layer/composed_backend.hpp"

#include <algorithm>

#include "layer/host_exchange.hpp"

namespace sonicmoe {
namespace {

// The layer around its experts. `beside` are the bytes of everything else, and plan_experts(limit)
// plans for what a limit leaves.
template <class PlanExperts>
LayerPlan plan_layer(std::size_t router_bytes, std::size_t beside, std::optional<std::size_t> limit,
                     PlanExperts plan_experts) {
  if (limit) *limit -= std::min(*limit, beside);
  LayerPlan plan{.experts = plan_experts(limit), .router_bytes = router_bytes, .workspace = {}};
  plan.workspace = plan.experts.workspace;
  plan.workspace.bytes += beside;
  plan.workspace.minimum_bytes += beside;
  return plan;
}

}  // namespace

LayerPlan ComposedBackend::plan_moe_layer_forward(const Context& context,
                                                  const MoELayerOptions& options,
                                                  const MoEShape& shape, bool inference,
                                                  std::optional<std::size_t> limit) const {
  std::size_t router = router_logits_workspace_bytes(context, shape);
  if (options.rounding) {
    router =
        std::max(router, round_tokens_workspace_bytes(context, shape.num_tokens, shape.num_experts,
                                                      options.router.top_k));
  }
  const std::size_t beside = layer_forward_bytes(router);
  return plan_layer(router, beside, limit, [&](std::optional<std::size_t> left) {
    return plan_moe_forward(context, shape, inference, left);
  });
}

LayerPlan ComposedBackend::plan_moe_layer_backward(const Context& context, const MoELayerOptions&,
                                                   const MoEShape& shape,
                                                   std::optional<std::size_t> limit,
                                                   BackwardStep step) const {
  const std::size_t router = router_logits_backward_workspace_bytes(context, shape);
  const std::size_t beside = layer_backward_bytes(shape, router, BackwardStep::kAll);
  LayerPlan plan = plan_layer(router, beside, limit, [&](std::optional<std::size_t> left) {
    return plan_moe_backward(context, shape, left, step);
  });
  plan.workspace.bytes = plan.experts.workspace.bytes + layer_backward_bytes(shape, router, step);
  return plan;
}

void ComposedBackend::moe_layer_forward(const Context& context, const LayerPlan& plan,
                                        const MoELayerForwardArgs& args) const {
  const LayerForwardScratch scratch = layer_scratch(plan, args);
  router_logits(context, args.x, args.router_weight, args.router_bias, args.logits, scratch.router);
  if (args.options.rounding) {
    RoundTokensForwardArgs rounding = round_tokens_args(args);
    rounding.workspace = scratch.router;
    round_tokens_forward(context, rounding);
  } else {
    route_forward(context, route_args(args));
  }
  MoEForwardArgs experts = expert_args(args);
  experts.workspace = scratch.experts;
  moe_forward(context, plan.experts, experts);
}

std::unique_ptr<ExchangePort> ComposedBackend::make_exchange(const Check&, const Context&,
                                                             const ExchangeShape& shape, int rank,
                                                             std::span<void* const> buffers,
                                                             double timeout_seconds) const {
  return make_host_exchange(shape, rank, buffers, timeout_seconds);
}

void ComposedBackend::host_grad_logits(const Context& context, const MoELayerBackwardArgs& args,
                                       const LayerBackwardScratch& scratch) const {
  if (args.options.rounding) {
    round_tokens_backward(context, round_tokens_args(args, scratch));
  } else {
    route_backward(context, route_args(args, scratch));
  }
  if (!args.grad_logits.defined()) return;
  auto* sum = scratch.grad_logits.as<float>();
  const auto* added = args.grad_logits.as<float>();
  for (std::int64_t i = 0; i < scratch.grad_logits.numel(); ++i) sum[i] += added[i];
}

}  // namespace sonicmoe
