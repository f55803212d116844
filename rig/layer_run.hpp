// The whole layer, router and experts as one operation: its case, its buffers and calls, and what
// is wrong with what it computes.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "rig/compare.hpp"
#include "rig/moe_case.hpp"
#include "sonicmoe/moe_layer.hpp"

namespace sonicmoe::rig {

struct LayerCase {
  MoECase experts;       ///< form A; its routing is not read
  RouterOptions router;  ///< its top_k is that of the experts
  std::optional<RoundingOptions> rounding;
  DType router_dtype = DType::kFloat32;
  DType router_gradient_dtype = DType::kFloat32;
  bool router_bias = false;
  bool auxiliary = false;                ///< grad_logits from an auxiliary loss
  std::optional<std::int64_t> max_rows;  ///< that of the experts is not read

  std::string describe() const;
};

/// The tensors of a layer on a target, which outlives them: poison until the calls, which may be
/// repeated, write them.
class LayerRun {
 public:
  LayerRun(const Target& target_, const LayerCase& layer_case,
           std::optional<std::size_t> forward_limit = {},
           std::optional<std::size_t> backward_limit = {});

  void forward();
  void backward();
  /// The same by four calls.
  void backward_in_steps();
  /// dS of the experts alone, in the shape of the routing weights, which the layer does not hand
  /// out. After forward().
  Tensor grad_routing_weights() const;
  /// "NAME: what happened" for what a call touched and must not.
  std::vector<std::string> violations() const;
  MoELayerSaved saved() const;
  Routing routing() const;

  const Target& target;
  LayerCase c;
  MoELayerOptions options;
  MoEInputs inputs;
  MoEShape shape;
  WorkspacePlan forward_plan, backward_plan;
  Tensor router_weight, router_bias, grad_logits;  // inputs
  Tensor out, logits, rows_per_expert, rows_dropped;
  Tensor topk_ids, token_ids, expert_ids, routing_weights, h;
  Tensor grad_x, grad_router_weight, grad_router_bias, grad_w1, grad_b1, grad_w2, grad_b2;
  GuardedBuffer metadata, forward_workspace, backward_workspace;

 private:
  MoELayerBackwardArgs backward_args() const;

  std::optional<std::size_t> forward_limit_, backward_limit_;
  std::vector<std::string> step_violations_;
};

/// What is wrong with a run after both calls, one line each: logits, choice and weights by the
/// router's definition; the output and all gradients by the definition of the experts with that
/// routing, from the H that was stored.
std::vector<std::string> check_layer(const LayerRun& run,
                                     Strictness strictness = Strictness::kRealistic);

}  // namespace sonicmoe::rig
