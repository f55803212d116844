// The router on the host: what the CPU and the reference backend share, and what every other
// backend is compared with. Arguments are validated by src/api/; see sonicmoe/router.hpp.
#pragma once

#include "layer/composed_backend.hpp"

namespace sonicmoe {

/// Implements the router half of Backend.
class HostRouterBackend : public ComposedBackend {
 public:
  void route_forward(const Context& context, const RouteForwardArgs& args) const override;
  void route_backward(const Context& context, const RouteBackwardArgs& args) const override;
  std::size_t round_tokens_workspace_bytes(const Context& context, std::int64_t num_tokens,
                                           std::int64_t num_experts,
                                           std::int64_t top_k) const override;
  void round_tokens_forward(const Context& context,
                            const RoundTokensForwardArgs& args) const override;
  void round_select(const Context& context, const RoundSelectArgs& args) const override;
  void round_tokens_backward(const Context& context,
                             const RoundTokensBackwardArgs& args) const override;
  void load_balancing_loss_forward(const Context& context, Scoring scoring, std::int64_t top_k,
                                   ConstTensorView logits, ConstTensorView rows_per_expert,
                                   TensorView loss) const override;
  void load_balancing_loss_backward(const Context& context, Scoring scoring, std::int64_t top_k,
                                    ConstTensorView logits, ConstTensorView rows_per_expert,
                                    ConstTensorView grad_loss,
                                    TensorView grad_logits) const override;
  void router_z_loss_forward(const Context& context, ConstTensorView logits,
                             TensorView loss) const override;
  void router_z_loss_backward(const Context& context, ConstTensorView logits,
                              ConstTensorView grad_loss, TensorView grad_logits) const override;
  void update_expert_bias(const Context& context, TensorView bias, ConstTensorView rows_per_expert,
                          float rate) const override;
};

}  // namespace sonicmoe
