// The tensors of every operation: each with the name that errors give it and what is done with it.
// The checks go through these lists, and so do the tests that try every argument's wrong forms: a
// tensor missing here is checked by nobody.
#pragma once

#include <concepts>
#include <type_traits>

#include "core/check.hpp"
#include "sonicmoe/exchange.hpp"
#include "sonicmoe/moe.hpp"
#include "sonicmoe/moe_layer.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe {

/// `Args` or `const Args`: one list serves the checks, which read, and the tests, which change.
template <class Given, class Args>
concept MaybeConst = std::same_as<std::remove_const_t<Given>, Args>;

// In all of these `visit(name, view, access)`.

template <MaybeConst<ExpertWeights> Weights, class Visit>
void for_each_tensor(Weights& w, Visit visit) {
  visit("w1", w.w1, Access::kRead);
  visit("b1", w.b1, Access::kRead);
  visit("w2", w.w2, Access::kRead);
  visit("b2", w.b2, Access::kRead);
}

template <MaybeConst<Routing> R, class Visit>
void for_each_tensor(R& routing, Visit visit) {
  if (auto* topk = std::get_if<TopKRouting>(&routing)) {
    visit("topk_ids", topk->topk_ids, Access::kRead);
    visit("topk_weights", topk->topk_weights, Access::kRead);
  } else if (auto* sorted = std::get_if<SortedRouting>(&routing)) {
    visit("offsets", sorted->offsets, Access::kRead);
    visit("row_weights", sorted->row_weights, Access::kRead);
  } else if (auto* pairs = std::get_if<PairRouting>(&routing)) {
    visit("token_ids", pairs->token_ids, Access::kRead);
    visit("expert_ids", pairs->expert_ids, Access::kRead);
    visit("pair_weights", pairs->pair_weights, Access::kRead);
  }
}

template <MaybeConst<MoEForwardArgs> Args, class Visit>
void for_each_tensor(Args& args, Visit visit) {
  visit("x", args.x, Access::kRead);
  for_each_tensor(args.weights, visit);
  for_each_tensor(args.routing, visit);
  visit("out", args.out, Access::kWrite);
  visit("h", args.h, Access::kWrite);
  visit("metadata", args.metadata, Access::kWrite);
  visit("rows_dropped", args.rows_dropped, Access::kWrite);
  visit("workspace", args.workspace, Access::kWrite);
}

/// What the steps of a backward hand on, once kHidden has written it.
inline Access handed_on(BackwardStep step) {
  return step == BackwardStep::kHidden ? Access::kWrite : Access::kRead;
}

template <class Args, class Visit>
void for_each_handed_on(Args& args, Visit visit) {
  visit("grad_h", args.grad_h, handed_on(args.step));
  visit("scaled_a", args.scaled_a, handed_on(args.step));
  // Its counters of tiles are used, and as they were afterwards.
  visit("row_lists", args.row_lists, handed_on(args.step));
}

template <MaybeConst<MoEBackwardArgs> Args, class Visit>
void for_each_tensor(Args& args, Visit visit) {
  visit("grad_out", args.grad_out, Access::kRead);
  visit("x", args.x, Access::kRead);
  for_each_tensor(args.weights, visit);
  for_each_tensor(args.routing, visit);
  visit("h", args.h, Access::kRead);
  visit("metadata", args.metadata, Access::kRead);
  visit("grad_x", args.grad_x, Access::kWrite);
  visit("grad_w1", args.grad_w1, Access::kWrite);
  visit("grad_b1", args.grad_b1, Access::kWrite);
  visit("grad_w2", args.grad_w2, Access::kWrite);
  visit("grad_b2", args.grad_b2, Access::kWrite);
  visit("grad_routing_weights", args.grad_routing_weights, Access::kWrite);
  for_each_handed_on(args, visit);
  visit("workspace", args.workspace, Access::kWrite);
}

template <MaybeConst<RouterLogitsForwardArgs> Args, class Visit>
void for_each_tensor(Args& args, Visit visit) {
  visit("x", args.x, Access::kRead);
  visit("router_weight", args.router_weight, Access::kRead);
  visit("router_bias", args.router_bias, Access::kRead);
  visit("logits", args.logits, Access::kWrite);
  visit("workspace", args.workspace, Access::kWrite);
}

template <MaybeConst<RouterLogitsBackwardArgs> Args, class Visit>
void for_each_tensor(Args& args, Visit visit) {
  visit("x", args.x, Access::kRead);
  visit("router_weight", args.router_weight, Access::kRead);
  visit("grad_logits", args.grad_logits, Access::kRead);
  visit("grad_x", args.grad_x, Access::kWrite);
  visit("grad_router_weight", args.grad_router_weight, Access::kWrite);
  visit("grad_router_bias", args.grad_router_bias, Access::kWrite);
  visit("workspace", args.workspace, Access::kWrite);
}

template <MaybeConst<RouterOptions> Options, class Visit>
void for_each_tensor(Options& options, Visit visit) {
  visit("selection_bias", options.selection_bias, Access::kRead);
}

template <MaybeConst<RoundingOptions> Options, class Visit>
void for_each_tensor(Options& options, Visit visit) {
  visit("seed_tensor", options.seed_tensor, Access::kRead);
}

template <MaybeConst<RouteForwardArgs> Args, class Visit>
void for_each_tensor(Args& args, Visit visit) {
  for_each_tensor(args.options, visit);
  visit("logits", args.logits, Access::kRead);
  visit("topk_ids", args.topk_ids, Access::kWrite);
  visit("topk_weights", args.topk_weights, Access::kWrite);
  visit("rows_per_expert", args.rows_per_expert, Access::kWrite);
}

template <MaybeConst<RouteBackwardArgs> Args, class Visit>
void for_each_tensor(Args& args, Visit visit) {
  for_each_tensor(args.options, visit);
  visit("logits", args.logits, Access::kRead);
  visit("topk_ids", args.topk_ids, Access::kRead);
  visit("grad_topk_weights", args.grad_topk_weights, Access::kRead);
  visit("grad_logits", args.grad_logits, Access::kWrite);
}

template <MaybeConst<RoundTokensForwardArgs> Args, class Visit>
void for_each_tensor(Args& args, Visit visit) {
  for_each_tensor(args.options, visit);
  for_each_tensor(args.rounding, visit);
  visit("logits", args.logits, Access::kRead);
  visit("targets", args.targets, Access::kRead);
  visit("token_ids", args.token_ids, Access::kWrite);
  visit("expert_ids", args.expert_ids, Access::kWrite);
  visit("pair_weights", args.pair_weights, Access::kWrite);
  visit("topk_ids", args.topk_ids, Access::kWrite);
  visit("rows_per_expert", args.rows_per_expert, Access::kWrite);
  visit("rows_per_expert_before", args.rows_per_expert_before, Access::kWrite);
  visit("workspace", args.workspace, Access::kWrite);
}

template <MaybeConst<RoundSelectArgs> Args, class Visit>
void for_each_tensor(Args& args, Visit visit) {
  for_each_tensor(args.rounding, visit);
  visit("scores", args.scores, Access::kRead);
  visit("topk_ids", args.topk_ids, Access::kRead);
  visit("targets", args.targets, Access::kRead);
  visit("token_ids", args.token_ids, Access::kWrite);
  visit("expert_ids", args.expert_ids, Access::kWrite);
  visit("rows_per_expert", args.rows_per_expert, Access::kWrite);
  visit("rows_per_expert_before", args.rows_per_expert_before, Access::kWrite);
  visit("workspace", args.workspace, Access::kWrite);
}

template <MaybeConst<RoundTokensBackwardArgs> Args, class Visit>
void for_each_tensor(Args& args, Visit visit) {
  for_each_tensor(args.options, visit);
  visit("logits", args.logits, Access::kRead);
  visit("topk_ids", args.topk_ids, Access::kRead);
  visit("token_ids", args.token_ids, Access::kRead);
  visit("expert_ids", args.expert_ids, Access::kRead);
  visit("grad_pair_weights", args.grad_pair_weights, Access::kRead);
  visit("grad_logits", args.grad_logits, Access::kWrite);
}

template <MaybeConst<MoELayerOptions> Options, class Visit>
void for_each_tensor(Options& options, Visit visit) {
  for_each_tensor(options.router, visit);
  if (options.rounding) for_each_tensor(*options.rounding, visit);
}

template <MaybeConst<MoELayerSaved> Saved, class Visit>
void for_each_tensor(Saved& saved, Access access, Visit visit) {
  visit("topk_ids", saved.topk_ids, access);
  visit("token_ids", saved.token_ids, access);
  visit("expert_ids", saved.expert_ids, access);
  visit("routing_weights", saved.routing_weights, access);
  visit("h", saved.h, access);
  visit("metadata", saved.metadata, access);
}

template <MaybeConst<MoELayerForwardArgs> Args, class Visit>
void for_each_tensor(Args& args, Visit visit) {
  for_each_tensor(args.options, visit);
  visit("x", args.x, Access::kRead);
  visit("router_weight", args.router_weight, Access::kRead);
  visit("router_bias", args.router_bias, Access::kRead);
  for_each_tensor(args.weights, visit);
  visit("out", args.out, Access::kWrite);
  visit("logits", args.logits, Access::kWrite);
  visit("rows_per_expert", args.rows_per_expert, Access::kWrite);
  visit("rows_dropped", args.rows_dropped, Access::kWrite);
  for_each_tensor(args.saved, Access::kWrite, visit);
  visit("workspace", args.workspace, Access::kWrite);
}

template <MaybeConst<MoELayerBackwardArgs> Args, class Visit>
void for_each_tensor(Args& args, Visit visit) {
  for_each_tensor(args.options, visit);
  visit("grad_out", args.grad_out, Access::kRead);
  visit("grad_logits", args.grad_logits, Access::kRead);
  visit("x", args.x, Access::kRead);
  visit("router_weight", args.router_weight, Access::kRead);
  for_each_tensor(args.weights, visit);
  visit("logits", args.logits, Access::kRead);
  for_each_tensor(args.saved, Access::kRead, visit);
  visit("grad_x", args.grad_x, Access::kWrite);
  visit("grad_router_weight", args.grad_router_weight, Access::kWrite);
  visit("grad_router_bias", args.grad_router_bias, Access::kWrite);
  visit("grad_w1", args.grad_w1, Access::kWrite);
  visit("grad_b1", args.grad_b1, Access::kWrite);
  visit("grad_w2", args.grad_w2, Access::kWrite);
  visit("grad_b2", args.grad_b2, Access::kWrite);
  for_each_handed_on(args, visit);
  visit("grad_routing_weights", args.grad_routing_weights, handed_on(args.step));
  visit("workspace", args.workspace, Access::kWrite);
}

template <MaybeConst<MoEExchangeForwardArgs> Args, class Visit>
void for_each_tensor(Args& args, Visit visit) {
  visit("x", args.x, Access::kRead);
  for_each_tensor(args.weights, visit);
  visit("topk_ids", args.topk_ids, Access::kRead);
  visit("topk_weights", args.topk_weights, Access::kRead);
  visit("out", args.out, Access::kWrite);
  visit("h", args.h, Access::kWrite);
  visit("metadata", args.metadata, Access::kWrite);
  visit("received", args.received, Access::kWrite);
  visit("rows_dropped", args.rows_dropped, Access::kWrite);
  visit("workspace", args.workspace, Access::kWrite);
}

template <MaybeConst<MoEExchangeBackwardArgs> Args, class Visit>
void for_each_tensor(Args& args, Visit visit) {
  visit("grad_out", args.grad_out, Access::kRead);
  visit("x", args.x, Access::kRead);
  for_each_tensor(args.weights, visit);
  visit("topk_ids", args.topk_ids, Access::kRead);
  visit("topk_weights", args.topk_weights, Access::kRead);
  visit("h", args.h, Access::kRead);
  visit("metadata", args.metadata, Access::kRead);
  visit("received", args.received, Access::kRead);
  visit("grad_x", args.grad_x, Access::kWrite);
  visit("grad_routing_weights", args.grad_routing_weights, Access::kWrite);
  visit("grad_w1", args.grad_w1, Access::kWrite);
  visit("grad_b1", args.grad_b1, Access::kWrite);
  visit("grad_w2", args.grad_w2, Access::kWrite);
  visit("grad_b2", args.grad_b2, Access::kWrite);
  visit("workspace", args.workspace, Access::kWrite);
}

/// The operands of a balancing loss, or of its backward: `loss` or `grad_loss` and `grad_logits`.
struct LossArgs {
  ConstTensorView logits;
  ConstTensorView rows_per_expert;
  ConstTensorView grad_loss;
  TensorView loss, grad_logits;
};

template <MaybeConst<LossArgs> Args, class Visit>
void for_each_tensor(Args& args, Visit visit) {
  visit("logits", args.logits, Access::kRead);
  visit("rows_per_expert", args.rows_per_expert, Access::kRead);
  visit("grad_loss", args.grad_loss, Access::kRead);
  visit("loss", args.loss, Access::kWrite);
  visit("grad_logits", args.grad_logits, Access::kWrite);
}

/// Of update_expert_bias.
struct ExpertBiasArgs {
  TensorView selection_bias;
  ConstTensorView rows_per_expert;
};

template <MaybeConst<ExpertBiasArgs> Args, class Visit>
void for_each_tensor(Args& args, Visit visit) {
  visit("selection_bias", args.selection_bias, Access::kWrite);
  visit("rows_per_expert", args.rows_per_expert, Access::kRead);
}

/// Devices, alignment and overlaps of a call's tensors, after their shapes have been checked.
template <class Args>
void check_memory(const Check& check, const Args& args) {
  CallMemory memory(check);
  for_each_tensor(args, [&](const char* name, const ConstTensorView& view, Access access) {
    memory.add(name, view, access);
  });
  memory.check_overlaps();
}

}  // namespace sonicmoe
