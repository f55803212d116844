#include "core/log.hpp"
#include "cuda/experts/experts.hpp"
#include "cuda/layer/layer.hpp"
#include "cuda/router/router.hpp"
#include "layer/parts.hpp"

namespace sonicmoe::cuda {
namespace {

// dlogits, written as both products read it where they and its kernel can, else as float32.
router::LogitsGradient grad_logits(const Context& context, const MoELayerBackwardArgs& args,
                                   const LayerBackwardScratch& scratch, const BackwardSteps& steps,
                                   const router::GradientTerms& terms) {
  const auto stream = static_cast<cudaStream_t>(context.stream.handle);
  const ConstTensorView& addend = args.grad_logits;
  const bool rounding = args.options.rounding.has_value();
  const auto split = [&] {
    if (rounding) {
      return router::split_round_tokens_backward(stream, round_tokens_args(args, scratch),
                                                 steps.metadata(), addend, terms);
    }
    return router::split_route_backward(stream, route_args(args, scratch), addend, terms);
  };
  router::LogitsGradient gradient{scratch.grad_logits.data(), args.logits.size(0),
                                  args.logits.size(1)};
  gradient.split = router::products_take_terms(args.x, args.router_weight, steps.slab_columns(),
                                               steps.grad_x_columns(0)) &&
                   split();
  log_choice("dlogits", [&] { return gradient.split ? "two bfloat16 terms" : "float32"; });
  if (gradient.split) return gradient;
  if (rounding) {
    router::round_tokens_backward(context, round_tokens_args(args, scratch));
  } else {
    router::route_backward(context, route_args(args, scratch));
  }
  if (addend.defined()) router::add_logits_gradient(context, scratch.grad_logits, addend);
  return gradient;
}

// The gradient of the logits, from dS; dX; the router's own gradients.
void input(const Context& context, const LayerPlan& plan, const MoELayerBackwardArgs& args,
           const LayerBackwardScratch& scratch, BackwardSteps& steps) {
  void* const router_scratch = scratch.router.data();
  const router::GradientTerms terms =
      router::router_grad_x_terms(router_scratch, context.device.index, plan.experts.shape);
  const router::LogitsGradient gradient = grad_logits(context, args, scratch, steps, terms);
  if (args.grad_x.defined()) {
    for_each_slab(plan.experts, [&](std::int64_t first, std::int64_t columns) {
      router::router_grad_x(context, gradient, args.router_weight, first, columns,
                            steps.grad_x_columns(first), terms);
      steps.grad_x(first, columns, /*add=*/true);
    });
  }
  router::router_logits_backward(context, args.x, gradient, args.grad_router_weight,
                                 args.grad_router_bias, args.accumulate, router_scratch);
}

}  // namespace

void layer_backward(const Context& context, const LayerPlan& plan,
                    const MoELayerBackwardArgs& args) {
  const LayerBackwardScratch scratch = layer_scratch(plan, args);
  const MoEBackwardArgs experts = expert_args(args, scratch);
  BackwardSteps steps(context, plan.experts, experts);
  steps.hidden();
  steps.down();
  if (does(args.step, BackwardStep::kInput)) input(context, plan, args, scratch, steps);
  steps.up();
}

}  // namespace sonicmoe::cuda
