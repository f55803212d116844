#include "router/host_router.hpp"

namespace sonicmoe {

void HostRouterBackend::layer_grad_logits(const Context& context, const MoELayerBackwardArgs& args,
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
