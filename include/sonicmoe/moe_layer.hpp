// The whole layer: router GEMM, routing (top-K or token rounding) and experts as one operation.
#pragma once

#include <optional>

#include "sonicmoe/moe.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe {

struct MoELayerOptions {
  ExpertOptions experts;
  RouterOptions router;
  /// Present: token rounding (training only); absent: plain top-K.
  std::optional<RoundingOptions> rounding;
};

/// What forward keeps for backward beside x, the weights and the logits. All contiguous.
struct MoELayerSaved {
  TensorView topk_ids;      ///< [T, K] int32
  TensorView token_ids;     ///< [P] int32, token rounding only (P = rounded_capacity())
  TensorView expert_ids;    ///< [P] int32, token rounding only
  TensorView pair_weights;  ///< [T, K] (top-K) or [P] (token rounding) float32
  TensorView h;             ///< [P, g*n], dtype of x; absent in inference (P = T*K for top-K)
  TensorView metadata;      ///< [moe_metadata_bytes()] uint8; absent in inference
};

struct MoELayerForwardArgs {
  MoELayerOptions options;
  ConstTensorView x;              ///< [T, d] float32|bfloat16
  ConstTensorView router_weight;  ///< Wr [E, d], dtype of x or float32, unit stride in d
  ConstTensorView
      router_bias;  ///< [E] dtype of router_weight or float32, or absent (gpt-oss has one)
  ExpertWeights weights;

  TensorView out;              ///< [T, d], dtype of x
  TensorView logits;           ///< [T, E] float32 = X Wr^T + bias, float32 accumulation
  TensorView rows_per_expert;  ///< [E] int32
  MoELayerSaved saved;
  TensorView workspace;  ///< [moe_layer_forward_workspace().bytes] uint8, 64-byte aligned
  std::optional<std::size_t> workspace_limit;
};

/// The MoEShape of the experts' part: form kTopK, or kPairs with P = rounded_capacity().
SONICMOE_API MoEShape moe_layer_shape(const MoELayerOptions& options, ConstTensorView x,
                                      const ExpertWeights& weights);

SONICMOE_API WorkspacePlan moe_layer_forward_workspace(
    const Context& context, const MoELayerOptions& options, const MoEShape& shape,
    bool inference = false, std::optional<std::size_t> workspace_limit = {});
SONICMOE_API WorkspacePlan moe_layer_backward_workspace(
    const Context& context, const MoELayerOptions& options, const MoEShape& shape,
    std::optional<std::size_t> workspace_limit = {});

/// Errors: those of route_forward or round_tokens_forward and of moe_forward.
SONICMOE_API void moe_layer_forward(const Context& context, const MoELayerForwardArgs& args);

struct MoELayerBackwardArgs {
  MoELayerOptions options;
  ConstTensorView grad_out;     ///< [T, d]
  ConstTensorView grad_logits;  ///< [T, E] float32: what auxiliary losses add; absent for none
  ConstTensorView x;
  ConstTensorView router_weight;
  ExpertWeights weights;
  ConstTensorView logits;
  MoELayerSaved saved;

  TensorView grad_x;              ///< as in MoEBackwardArgs; includes the router's share
  TensorView grad_router_weight;  ///< [E, d], dtype of router_weight or float32
  TensorView grad_router_bias;    ///< [E], dtype of router_bias or float32
  TensorView grad_w1, grad_b1, grad_w2, grad_b2;
  bool accumulate = false;  ///< of the experts' and the router's parameter gradients

  TensorView workspace;
  std::optional<std::size_t> workspace_limit;
};

SONICMOE_API void moe_layer_backward(const Context& context, const MoELayerBackwardArgs& args);

}  // namespace sonicmoe
