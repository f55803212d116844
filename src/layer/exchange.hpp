// A call of moe_exchange_forward or moe_exchange_backward as the steps of a port and the layer that
// a backend runs on what came.
#pragma once

#include "core/backend.hpp"
#include "core/exchange.hpp"

namespace sonicmoe {

struct ExchangeScratch {
  std::int32_t* ids;   ///< [EP * T_max, K] of all ranks' slots
  float* weights;      ///< [EP * T_max, K]
  TensorView experts;  ///< [bytes] uint8, or absent where there is no workspace yet
};

/// Bytes of the scratch beside its experts'.
std::size_t exchange_scratch_bytes(const ExchangeShape& shape);
/// The pieces of `workspace`, of whatever size it has.
ExchangeScratch exchange_scratch(const ExchangeShape& shape, const TensorView& workspace);

/// What a rank's layer computes, on its places and its own experts. The views of ids and weights
/// have addresses also where the scratch has none, so that the layer's checks can look at them.
MoEForwardArgs expert_args(const Exchange& exchange, const Device& device,
                           const MoEExchangeForwardArgs& args);
MoEBackwardArgs expert_args(const Exchange& exchange, const Device& device,
                            const MoEExchangeBackwardArgs& args);

/// The whole calls. `experts` are expert_args(), `plan` the backend's plan for them.
void exchange_forward(const Backend& backend, const Context& context, Exchange& exchange,
                      const ExpertPlan& plan, const MoEForwardArgs& experts,
                      const MoEExchangeForwardArgs& args);
void exchange_backward(const Backend& backend, const Context& context, Exchange& exchange,
                       const ExpertPlan& plan, const MoEBackwardArgs& experts,
                       const MoEExchangeBackwardArgs& args);

}  // namespace sonicmoe
