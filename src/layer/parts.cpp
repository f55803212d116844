#include "layer/parts.hpp"

#include <span>

#include "core/workspace.hpp"

namespace sonicmoe {
namespace {

// What lies in a layer's scratch, in this order.
struct Pieces {
  void* grad_routing_weights = nullptr;  // backward: [P] float32
  void* grad_logits = nullptr;           // backward: [T, E] float32
  void* router = nullptr;
  void* experts = nullptr;
};

Pieces carve_forward(WorkspaceCarver& carver, std::size_t router_bytes, std::size_t expert_bytes) {
  Pieces pieces;
  pieces.router = carver.take_bytes(router_bytes);
  pieces.experts = carver.take_bytes(expert_bytes);
  return pieces;
}

Pieces carve_backward(WorkspaceCarver& carver, const MoEShape& shape, std::size_t router_bytes,
                      std::size_t expert_bytes, BackwardStep step) {
  Pieces pieces;
  if (step == BackwardStep::kAll) {
    pieces.grad_routing_weights = carver.take<float>(static_cast<std::size_t>(shape.num_pairs));
  }
  if (does(step, BackwardStep::kInput)) {
    const std::int64_t logits = shape.num_tokens * shape.num_experts;
    pieces.grad_logits = carver.take<float>(static_cast<std::size_t>(logits));
    pieces.router = carver.take_bytes(router_bytes);
  }
  pieces.experts = carver.take_bytes(expert_bytes);
  return pieces;
}

TensorView bytes_view(void* data, std::size_t bytes, const Device& device) {
  return {data, DType::kUInt8, {static_cast<std::int64_t>(bytes)}, device};
}

// Absent where the step has no such piece.
TensorView floats_view(void* data, std::span<const std::int64_t> shape, const Device& device) {
  return data == nullptr ? TensorView() : TensorView(data, DType::kFloat32, shape, device);
}

Routing routing_of(const MoELayerOptions& options, const MoELayerSaved& saved) {
  if (options.rounding)
    return PairRouting{saved.token_ids, saved.expert_ids, saved.routing_weights};
  return TopKRouting{saved.topk_ids, saved.routing_weights};
}

}  // namespace

std::size_t layer_forward_bytes(std::size_t router_bytes) {
  WorkspaceCarver carver;
  carve_forward(carver, router_bytes, 0);
  return carver.used();
}

std::size_t layer_backward_bytes(const MoEShape& shape, std::size_t router_bytes,
                                 BackwardStep step) {
  WorkspaceCarver carver;
  carve_backward(carver, shape, router_bytes, 0, step);
  return carver.used();
}

LayerForwardScratch layer_scratch(const LayerPlan& plan, const MoELayerForwardArgs& args) {
  WorkspaceCarver carver(args.workspace.data());
  const std::size_t expert_bytes = plan.experts.workspace.bytes;
  const Pieces pieces = carve_forward(carver, plan.router_bytes, expert_bytes);
  const Device device = args.x.device();
  return {.router = bytes_view(pieces.router, plan.router_bytes, device),
          .experts = bytes_view(pieces.experts, expert_bytes, device)};
}

LayerBackwardScratch layer_scratch(const LayerPlan& plan, const MoELayerBackwardArgs& args) {
  WorkspaceCarver carver(args.workspace.data());
  const std::size_t expert_bytes = plan.experts.workspace.bytes;
  const Pieces pieces =
      carve_backward(carver, plan.experts.shape, plan.router_bytes, expert_bytes, args.step);
  const Device device = args.x.device();
  const std::size_t router_bytes = pieces.router == nullptr ? 0 : plan.router_bytes;
  return {.grad_routing_weights = args.step == BackwardStep::kAll
                                      ? floats_view(pieces.grad_routing_weights,
                                                    args.saved.routing_weights.shape(), device)
                                      : args.grad_routing_weights,
          .grad_logits = floats_view(pieces.grad_logits, args.logits.shape(), device),
          .router = bytes_view(pieces.router, router_bytes, device),
          .experts = bytes_view(pieces.experts, expert_bytes, device)};
}

RouteForwardArgs route_args(const MoELayerForwardArgs& args) {
  return {.options = args.options.router,
          .logits = args.logits,
          .topk_ids = args.saved.topk_ids,
          .topk_weights = args.saved.routing_weights,
          .rows_per_expert = args.rows_per_expert};
}

RoundTokensForwardArgs round_tokens_args(const MoELayerForwardArgs& args) {
  return {.options = args.options.router,
          .rounding = *args.options.rounding,
          .logits = args.logits,
          .targets = {},
          .token_ids = args.saved.token_ids,
          .expert_ids = args.saved.expert_ids,
          .pair_weights = args.saved.routing_weights,
          .topk_ids = args.saved.topk_ids,
          .rows_per_expert = args.rows_per_expert,
          .rows_per_expert_before = {},
          .workspace = {}};
}

MoEForwardArgs expert_args(const MoELayerForwardArgs& args) {
  return {.options = args.options.experts,
          .x = args.x,
          .weights = args.weights,
          .routing = routing_of(args.options, args.saved),
          .out = args.out,
          .h = args.saved.h,
          .metadata = args.saved.metadata,
          .rows_dropped = args.rows_dropped,
          .workspace = {},
          .workspace_limit = {}};
}

MoEBackwardArgs expert_args(const MoELayerBackwardArgs& args) {
  return {.options = args.options.experts,
          .grad_out = args.grad_out,
          .x = args.x,
          .weights = args.weights,
          .routing = routing_of(args.options, args.saved),
          .h = args.saved.h,
          .metadata = args.saved.metadata,
          .grad_x = args.grad_x,
          .grad_w1 = args.grad_w1,
          .grad_b1 = args.grad_b1,
          .grad_w2 = args.grad_w2,
          .grad_b2 = args.grad_b2,
          .grad_routing_weights =
              args.step == BackwardStep::kHidden ? args.grad_routing_weights : TensorView(),
          .accumulate = args.accumulate,
          .step = args.step,
          .grad_h = args.grad_h,
          .scaled_a = args.scaled_a,
          .row_lists = args.row_lists,
          .workspace = {},
          .workspace_limit = {}};
}

MoEBackwardArgs expert_args(const MoELayerBackwardArgs& args, const LayerBackwardScratch& scratch) {
  MoEBackwardArgs experts = expert_args(args);
  if (does(args.step, BackwardStep::kHidden)) {
    experts.grad_routing_weights = scratch.grad_routing_weights;
  }
  experts.workspace = scratch.experts;
  return experts;
}

RouteBackwardArgs route_args(const MoELayerBackwardArgs& args,
                             const LayerBackwardScratch& scratch) {
  return {.options = args.options.router,
          .logits = args.logits,
          .topk_ids = args.saved.topk_ids,
          .grad_topk_weights = scratch.grad_routing_weights,
          .grad_logits = scratch.grad_logits};
}

RoundTokensBackwardArgs round_tokens_args(const MoELayerBackwardArgs& args,
                                          const LayerBackwardScratch& scratch) {
  return {.options = args.options.router,
          .logits = args.logits,
          .topk_ids = args.saved.topk_ids,
          .token_ids = args.saved.token_ids,
          .expert_ids = args.saved.expert_ids,
          .grad_pair_weights = scratch.grad_routing_weights,
          .grad_logits = scratch.grad_logits};
}

}  // namespace sonicmoe
