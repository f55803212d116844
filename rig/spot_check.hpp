// Checks a layer too large for the oracle on parts that it can afford.
#pragma once

#include <string>
#include <vector>

#include "rig/moe_case.hpp"

namespace sonicmoe::rig {

/// A layer of form A after forward and backward, all tensors contiguous and without biases.
struct LayerResults {
  const MoEInputs& inputs;
  const Tensor &topk_ids, &topk_weights, &h;
  const Tensor &out, &grad_x, &grad_w1, &grad_w2;
  const Tensor& grad_routing_weights;  ///< of the experts, [T, K] float32
  // The router's, where grad_x includes its share; null without it. Scoring topk_softmax.
  const Tensor* router_weight = nullptr;
  const Tensor* grad_router_weight = nullptr;
};

/// Three tokens with all their experts (out, dX, dS), and some hidden units of one expert with all
/// its rows (dW1, dW2): forward and dX of a token depend on that token alone, a unit's rows of dW
/// on the unit and its expert's rows alone, so these are whole results at a small share of the
/// cost. dWr of two experts is the sum over their tokens, from the dS just checked. Returns what is
/// wrong, one line each.
std::vector<std::string> spot_check(const LayerResults& results);

}  // namespace sonicmoe::rig
