// moe_layer out of a backend's own router and experts.
#pragma once

#include "core/backend.hpp"
#include "layer/parts.hpp"

namespace sonicmoe {

/// A backend whose layer runs the router, then the experts. Backward interleaves the two, since dX
/// sums both in one rounding: its order is the backend's own (layer/parts.hpp has the pieces).
class ComposedBackend : public Backend {
 public:
  LayerPlan plan_moe_layer_forward(const Context& context, const MoELayerOptions& options,
                                   const MoEShape& shape, bool inference,
                                   std::optional<std::size_t> limit) const override;
  LayerPlan plan_moe_layer_backward(const Context& context, const MoELayerOptions& options,
                                    const MoEShape& shape, std::optional<std::size_t> limit,
                                    BackwardStep step) const override;
  void moe_layer_forward(const Context& context, const LayerPlan& plan,
                         const MoELayerForwardArgs& args) const override;
  /// In host memory.
  std::unique_ptr<ExchangePort> make_exchange(const Check& check, const Context& context,
                                              const ExchangeShape& shape, int rank,
                                              std::span<void* const> buffers,
                                              double timeout_seconds) const override;

 protected:
  /// For backward in host memory: scratch.grad_logits = the gradient of the logits through the
  /// routing weights, from scratch.grad_routing_weights, plus args.grad_logits.
  void host_grad_logits(const Context& context, const MoELayerBackwardArgs& args,
                        const LayerBackwardScratch& scratch) const;
};

}  // namespace sonicmoe
