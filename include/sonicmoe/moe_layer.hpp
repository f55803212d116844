// The whole layer: router GEMM, routing (top-K or token rounding) and experts as one operation.
#pragma once

#include <optional>

#include "sonicmoe/moe.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe {

/// Options of both parts.
struct MoELayerOptions {
  ExpertOptions experts;
  RouterOptions router;
  /// Present: token rounding (training only); absent: plain top-K.
  std::optional<RoundingOptions> rounding;
};

/// What forward keeps for backward beside x, the weights and the logits. All contiguous.
struct MoELayerSaved {
  TensorView topk_ids;         ///< [T, K] int32
  TensorView token_ids;        ///< [P] int32, token rounding only (P = rounded_capacity())
  TensorView expert_ids;       ///< [P] int32, token rounding only
  TensorView routing_weights;  ///< [T, K] (top-K) or [P] (token rounding) float32
  TensorView h;                ///< [C, g*n], dtype of x; absent in inference (P = T*K for top-K)
  TensorView metadata;         ///< [moe_metadata_bytes()] uint8; absent in inference
};

/// Of moe_layer_forward().
struct MoELayerForwardArgs {
  MoELayerOptions options;
  ConstTensorView x;              ///< [T, d] float32|bfloat16, unit stride in d
  ConstTensorView router_weight;  ///< Wr [E, d], dtype of x or float32, unit stride in d
  ConstTensorView router_bias;    ///< br [E], dtype of router_weight or float32, or absent
  ExpertWeights weights;

  TensorView out;              ///< [T, d], dtype of x, unit stride in d; every element written
  TensorView logits;           ///< [T, E] float32 contiguous
  TensorView rows_per_expert;  ///< [E] int32, after rounding, whatever max_rows leaves out
  TensorView rows_dropped;     ///< [1] int32 or absent: rows that max_rows left no room for
  MoELayerSaved saved;         ///< h and metadata absent in inference; the ids are always written
  TensorView workspace;  ///< [moe_layer_forward_workspace().bytes] uint8 (or more), 64-byte aligned
  std::optional<std::size_t> workspace_limit;  ///< the value given to the size query
};

/// The MoEShape of the experts' part: form kTopK, or kPairs with P = rounded_capacity().
SONICMOE_API MoEShape moe_layer_shape(const MoELayerOptions& options, ConstTensorView x,
                                      const ExpertWeights& weights);

/// Scratch of moe_layer_forward (`inference`: without h and metadata): the router's and the
/// experts', of which `workspace_limit` bounds the sum; the slabs are the experts'.
/// Errors: a limit below minimum_bytes (the message names it); a shape that is not
/// moe_layer_shape() of these options.
SONICMOE_API WorkspacePlan moe_layer_forward_workspace(
    const Context& context, const MoELayerOptions& options, const MoEShape& shape,
    bool inference = false, std::optional<std::size_t> workspace_limit = {});
/// Likewise of moe_layer_backward, or one step of it; with the gradient of the logits (kInput), and
/// in kAll that of the routing weights.
SONICMOE_API WorkspacePlan moe_layer_backward_workspace(
    const Context& context, const MoELayerOptions& options, const MoEShape& shape,
    std::optional<std::size_t> workspace_limit = {}, BackwardStep step = BackwardStep::kAll);

/// logits = X Wr^T + br, float32 sums; the routing of route_forward, or of round_tokens_forward;
/// out as moe_forward with its rows.
/// Errors: those of route_forward or round_tokens_forward and of moe_forward.
SONICMOE_API void moe_layer_forward(const Context& context, const MoELayerForwardArgs& args);

/// Of moe_layer_backward(). Steps in brackets: present in these alone.
struct MoELayerBackwardArgs {
  MoELayerOptions options;
  ConstTensorView grad_out;     ///< dO [T, d], dtype of x, unit stride in d (kHidden, kDown)
  ConstTensorView grad_logits;  ///< [T, E] float32 contiguous: what auxiliary losses add, or absent
                                ///< (kInput)
  ConstTensorView x;            ///< as in forward, like the next two
  ConstTensorView router_weight;
  ExpertWeights weights;   ///< b1 is not read
  ConstTensorView logits;  ///< from forward
  MoELayerSaved saved;     ///< from forward, metadata present, and h (kHidden)

  // Every gradient is optional; one that is present is written in full.
  TensorView grad_x;              ///< [T, d], dtype of x, unit stride in d (kInput)
  TensorView grad_router_weight;  ///< [E, d], unit stride in d; dtype of router_weight or float32
                                  ///< (kInput)
  TensorView grad_router_bias;    ///< [E]; dtype of router_weight or float32 (kInput)
  TensorView grad_w1, grad_b1, grad_w2, grad_b2;  ///< as in MoEBackwardArgs
  bool accumulate = false;  ///< adds to the (float32) gradients of all parameters, not to grad_x

  BackwardStep step = BackwardStep::kAll;
  // What the steps hand on, absent in kAll.
  TensorView grad_h, scaled_a, row_lists;  ///< as in MoEBackwardArgs
  TensorView grad_routing_weights;  ///< dS float32, shape of saved.routing_weights, contiguous:
                                    ///< written by kHidden, read by kInput, absent in others

  TensorView
      workspace;  ///< [moe_layer_backward_workspace().bytes] uint8 (or more), 64-byte aligned
  std::optional<std::size_t> workspace_limit;  ///< the value given to the size query
};

/// The experts' gradients as moe_backward; with dS, their gradients of the routing weights:
///   dLogits = dS through route_backward or round_tokens_backward, + grad_logits
///   dWr = dLogits^T X;  dbr = sum over the tokens of dLogits
///   dX[t] = sum over the rows of t of dH[r] W1[e] + dLogits[t] Wr, rounded once
/// Errors: as moe_layer_forward; accumulate with a gradient buffer that is not float32; on the CPU,
/// metadata or ids that forward could not have written.
SONICMOE_API void moe_layer_backward(const Context& context, const MoELayerBackwardArgs& args);

}  // namespace sonicmoe
