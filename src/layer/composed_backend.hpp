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

  // The router's products.
  /// Scratch of router_logits() and of router_logits_backward().
  virtual std::size_t router_logits_workspace_bytes(const Context& context,
                                                    const MoEShape& shape) const = 0;
  virtual std::size_t router_logits_backward_workspace_bytes(const Context& context,
                                                             const MoEShape& shape) const = 0;
  /// logits [T, E] float32 = x [T, d] weight [E, d]^T + bias [E] (may be absent).
  virtual void router_logits(const Context& context, ConstTensorView x, ConstTensorView weight,
                             ConstTensorView bias, TensorView logits,
                             TensorView workspace) const = 0;
  /// grad_weight [E, d] = grad_logits^T x, grad_bias [E] = column sums of grad_logits [T, E]
  /// float32; either may be absent; overwritten, or added to with `accumulate`.
  virtual void router_logits_backward(const Context& context, ConstTensorView x,
                                      ConstTensorView grad_logits, TensorView grad_weight,
                                      TensorView grad_bias, bool accumulate,
                                      TensorView workspace) const = 0;

 protected:
  /// For backward in host memory: scratch.grad_logits = the gradient of the logits through the
  /// routing weights, from scratch.grad_routing_weights, plus args.grad_logits.
  void host_grad_logits(const Context& context, const MoELayerBackwardArgs& args,
                        const LayerBackwardScratch& scratch) const;
};

}  // namespace sonicmoe
