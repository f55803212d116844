// A call of moe_layer as calls of its parts: the router's and the experts'.
#pragma once

#include "core/plan.hpp"
#include "sonicmoe/moe_layer.hpp"

namespace sonicmoe {

// ---------------------------------------------------------------------------------------- scratch

struct LayerForwardScratch {
  TensorView router, experts;  ///< [bytes] uint8
};
struct LayerBackwardScratch {
  /// [T, K], or [P] with token rounding, float32. The caller's in steps.
  TensorView grad_routing_weights;
  TensorView grad_logits;      ///< [T, E] float32, where the step has use for it, as for `router`
  TensorView router, experts;  ///< [bytes] uint8
};

/// Bytes of the layer's scratch beside its experts'.
std::size_t layer_forward_bytes(std::size_t router_bytes);
std::size_t layer_backward_bytes(const MoEShape& shape, std::size_t router_bytes,
                                 BackwardStep step);

/// The pieces of args.workspace.
LayerForwardScratch layer_scratch(const LayerPlan& plan, const MoELayerForwardArgs& args);
LayerBackwardScratch layer_scratch(const LayerPlan& plan, const MoELayerBackwardArgs& args);

// ---------------------------------------------------------------------------------------- forward

// All but the workspaces, which the caller sets. route_args() without token rounding,
// round_tokens_args() with it.
RouteForwardArgs route_args(const MoELayerForwardArgs& args);
RoundTokensForwardArgs round_tokens_args(const MoELayerForwardArgs& args);
MoEForwardArgs expert_args(const MoELayerForwardArgs& args);

// --------------------------------------------------------------------------------------- backward

/// Without its workspace, and in kAll grad_routing_weights.
MoEBackwardArgs expert_args(const MoELayerBackwardArgs& args);
/// With both, from the scratch.
MoEBackwardArgs expert_args(const MoELayerBackwardArgs& args, const LayerBackwardScratch& scratch);
/// From scratch.grad_routing_weights to scratch.grad_logits; args.grad_logits is not in it.
RouteBackwardArgs route_args(const MoELayerBackwardArgs& args, const LayerBackwardScratch& scratch);
RoundTokensBackwardArgs round_tokens_args(const MoELayerBackwardArgs& args,
                                          const LayerBackwardScratch& scratch);

}  // namespace sonicmoe
