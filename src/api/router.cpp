// Validation and dispatch of the router's operations.
#include "sonicmoe/router.hpp"

#include "api/moe_checks.hpp"
#include "core/backend.hpp"
#include "core/check.hpp"

namespace sonicmoe {
namespace {

std::string text(std::int64_t value) { return std::to_string(value); }

void check_matrix(const Check& check, const char* name, const ConstTensorView& view,
                  std::initializer_list<DType> dtypes) {
  check.rank(name, view, 2);
  check.dtype(name, view, dtypes);
  check.contiguous(name, view);
}

void check_like_logits(const Check& check, const char* name, const ConstTensorView& view,
                       const ConstTensorView& logits) {
  check.shape_like(name, view, logits);
  check.dtype(name, view, {DType::kFloat32});
  check.contiguous(name, view);
}

void check_vector(const Check& check, const char* name, const ConstTensorView& view,
                  std::int64_t size, DType dtype) {
  check.shape(name, view, {size});
  check.dtype(name, view, {dtype});
  check.contiguous(name, view);
}

void check_logits(const Check& check, const ConstTensorView& logits) {
  check_matrix(check, "logits", logits, {DType::kFloat32});
  check.that(logits.size(1) > 0, "logits", "at least one expert", logits.describe());
}

void check_options(const Check& check, const RouterOptions& options, std::int64_t num_experts) {
  check.that(options.top_k >= 1 && options.top_k <= num_experts, "top_k", "1.." + text(num_experts),
             text(options.top_k));
  check.that(options.scoring != Scoring::kTopKSoftmax || options.renormalize.value_or(true),
             "renormalize", "unset or true with topk_softmax", "false");
  const bool sigmoid = options.scoring == Scoring::kSigmoidTopK;
  if (options.selection_bias.defined()) {
    check.that(sigmoid, "selection_bias", "none with " + std::string(name_of(options.scoring)),
               options.selection_bias.describe());
    check_vector(check, "selection_bias", options.selection_bias, num_experts, DType::kFloat32);
  }
  check.that(options.num_groups >= 1 && num_experts % options.num_groups == 0, "num_groups",
             "a divisor of " + text(num_experts), text(options.num_groups));
  check.that(sigmoid || options.num_groups == 1, "num_groups",
             "1 with " + std::string(name_of(options.scoring)), text(options.num_groups));
  check.that(options.top_groups >= 1 && options.top_groups <= options.num_groups, "top_groups",
             "1.." + text(options.num_groups), text(options.top_groups));
  const std::int64_t selectable = options.top_groups * (num_experts / options.num_groups);
  check.that(options.top_k <= selectable, "top_k",
             "at most " + text(selectable) + ", the experts of top_groups groups",
             text(options.top_k));
}

void check_rows(const Check& check, const char* name, const ConstTensorView& rows,
                std::int64_t num_experts) {
  if (rows.defined()) check_vector(check, name, rows, num_experts, DType::kInt32);
}

void check_rounding(const Check& check, const RoundingOptions& rounding, std::int64_t num_tokens) {
  check.that(rounding.tile >= 1, "tile", "at least 1", text(rounding.tile));
  check.that(num_tokens >= rounding.tile, "tile",
             "at most the number of tokens, " + text(num_tokens), text(rounding.tile));
  if (rounding.seed_tensor.defined()) {
    check_vector(check, "seed_tensor", rounding.seed_tensor, 1, DType::kInt64);
  }
}

// The outputs and scratch that round_tokens_forward and round_select have in common.
template <class Args>
void check_pair_list(const Check& check, const Backend& backend, const Context& context,
                     const Args& args, std::int64_t num_tokens, std::int64_t num_experts,
                     std::int64_t top_k) {
  const std::int64_t pairs = rounded_capacity(num_tokens, num_experts, top_k, args.rounding);
  check_vector(check, "token_ids", args.token_ids, pairs, DType::kInt32);
  check_vector(check, "expert_ids", args.expert_ids, pairs, DType::kInt32);
  check_rows(check, "rows_per_expert", args.rows_per_expert, num_experts);
  check_rows(check, "rows_per_expert_before", args.rows_per_expert_before, num_experts);
  check.buffer("workspace", args.workspace,
               backend.round_tokens_workspace_bytes(context, num_tokens, num_experts, top_k), 64);
}

void check_loss(const Check& check, Scoring, std::int64_t top_k, const ConstTensorView& logits,
                const ConstTensorView& rows) {
  check_logits(check, logits);
  check.that(top_k >= 1 && top_k <= logits.size(1), "top_k", "1.." + text(logits.size(1)),
             text(top_k));
  check_vector(check, "rows_per_expert", rows, logits.size(1), DType::kInt32);
}

}  // namespace

void route_forward(const Context& context, const RouteForwardArgs& args) {
  const Check check("route_forward");
  check_logits(check, args.logits);
  const std::int64_t num_experts = args.logits.size(1);
  check_options(check, args.options, num_experts);
  check_matrix(check, "topk_ids", args.topk_ids, {DType::kInt32, DType::kInt64});
  check.shape("topk_ids", args.topk_ids, {args.logits.size(0), args.options.top_k});
  check_matrix(check, "topk_weights", args.topk_weights, {DType::kFloat32});
  check.shape_like("topk_weights", args.topk_weights, args.topk_ids);
  check_rows(check, "rows_per_expert", args.rows_per_expert, num_experts);
  choose_backend(context, "route_forward").route_forward(context, args);
}

void check_route_backward(const RouteBackwardArgs& args) {
  const Check check("route_backward");
  check_logits(check, args.logits);
  check_options(check, args.options, args.logits.size(1));
  check_matrix(check, "topk_ids", args.topk_ids, {DType::kInt32, DType::kInt64});
  check.shape("topk_ids", args.topk_ids, {args.logits.size(0), args.options.top_k});
  check_matrix(check, "grad_topk_weights", args.grad_topk_weights, {DType::kFloat32});
  check.shape_like("grad_topk_weights", args.grad_topk_weights, args.topk_ids);
  check_like_logits(check, "grad_logits", args.grad_logits, args.logits);
}

void route_backward(const Context& context, const RouteBackwardArgs& args) {
  check_route_backward(args);
  choose_backend(context, "route_backward").route_backward(context, args);
}

std::size_t round_tokens_workspace_bytes(const Context& context, std::int64_t num_tokens,
                                         std::int64_t num_experts, std::int64_t top_k) {
  return choose_backend(context, "round_tokens_workspace_bytes")
      .round_tokens_workspace_bytes(context, num_tokens, num_experts, top_k);
}

void round_tokens_forward(const Context& context, const RoundTokensForwardArgs& args) {
  const Check check("round_tokens_forward");
  check_logits(check, args.logits);
  const std::int64_t num_tokens = args.logits.size(0);
  const std::int64_t num_experts = args.logits.size(1);
  check_options(check, args.options, num_experts);
  check_rounding(check, args.rounding, num_tokens);
  const Backend& backend = choose_backend(context, "round_tokens_forward");
  check_pair_list(check, backend, context, args, num_tokens, num_experts, args.options.top_k);
  check_vector(check, "pair_weights", args.pair_weights, args.token_ids.size(0), DType::kFloat32);
  check_matrix(check, "topk_ids", args.topk_ids, {DType::kInt32});
  check.shape("topk_ids", args.topk_ids, {num_tokens, args.options.top_k});
  backend.round_tokens_forward(context, args);
}

void round_select(const Context& context, const RoundSelectArgs& args) {
  const Check check("round_select");
  check_matrix(check, "scores", args.scores, {DType::kFloat32});
  check.that(args.scores.size(1) > 0, "scores", "at least one expert", args.scores.describe());
  check_matrix(check, "topk_ids", args.topk_ids, {DType::kInt32});
  check.shape("topk_ids", args.topk_ids, {args.scores.size(0), args.topk_ids.size(1)});
  check_rounding(check, args.rounding, args.scores.size(0));
  const Backend& backend = choose_backend(context, "round_select");
  check_pair_list(check, backend, context, args, args.scores.size(0), args.scores.size(1),
                  args.topk_ids.size(1));
  backend.round_select(context, args);
}

void check_round_tokens_backward(const RoundTokensBackwardArgs& args) {
  const Check check("round_tokens_backward");
  check_logits(check, args.logits);
  check_options(check, args.options, args.logits.size(1));
  check_matrix(check, "topk_ids", args.topk_ids, {DType::kInt32});
  check.shape("topk_ids", args.topk_ids, {args.logits.size(0), args.options.top_k});
  check.rank("token_ids", args.token_ids, 1);
  const std::int64_t pairs = args.token_ids.size(0);
  check_vector(check, "token_ids", args.token_ids, pairs, DType::kInt32);
  check_vector(check, "expert_ids", args.expert_ids, pairs, DType::kInt32);
  check_vector(check, "grad_pair_weights", args.grad_pair_weights, pairs, DType::kFloat32);
  check_like_logits(check, "grad_logits", args.grad_logits, args.logits);
}

void round_tokens_backward(const Context& context, const RoundTokensBackwardArgs& args) {
  check_round_tokens_backward(args);
  choose_backend(context, "round_tokens_backward").round_tokens_backward(context, args);
}

void load_balancing_loss_forward(const Context& context, Scoring scoring, std::int64_t top_k,
                                 ConstTensorView logits, ConstTensorView rows_per_expert,
                                 TensorView loss) {
  const Check check("load_balancing_loss_forward");
  check_loss(check, scoring, top_k, logits, rows_per_expert);
  check_vector(check, "loss", loss, 1, DType::kFloat32);
  choose_backend(context, "load_balancing_loss_forward")
      .load_balancing_loss_forward(context, scoring, top_k, logits, rows_per_expert, loss);
}

void load_balancing_loss_backward(const Context& context, Scoring scoring, std::int64_t top_k,
                                  ConstTensorView logits, ConstTensorView rows_per_expert,
                                  ConstTensorView grad_loss, TensorView grad_logits) {
  const Check check("load_balancing_loss_backward");
  check_loss(check, scoring, top_k, logits, rows_per_expert);
  check_vector(check, "grad_loss", grad_loss, 1, DType::kFloat32);
  check_like_logits(check, "grad_logits", grad_logits, logits);
  choose_backend(context, "load_balancing_loss_backward")
      .load_balancing_loss_backward(context, scoring, top_k, logits, rows_per_expert, grad_loss,
                                    grad_logits);
}

void router_z_loss_forward(const Context& context, ConstTensorView logits, TensorView loss) {
  const Check check("router_z_loss_forward");
  check_logits(check, logits);
  check_vector(check, "loss", loss, 1, DType::kFloat32);
  choose_backend(context, "router_z_loss_forward").router_z_loss_forward(context, logits, loss);
}

void router_z_loss_backward(const Context& context, ConstTensorView logits,
                            ConstTensorView grad_loss, TensorView grad_logits) {
  const Check check("router_z_loss_backward");
  check_logits(check, logits);
  check_vector(check, "grad_loss", grad_loss, 1, DType::kFloat32);
  check_like_logits(check, "grad_logits", grad_logits, logits);
  choose_backend(context, "router_z_loss_backward")
      .router_z_loss_backward(context, logits, grad_loss, grad_logits);
}

void update_expert_bias(const Context& context, TensorView bias, ConstTensorView rows_per_expert,
                        float rate) {
  const Check check("update_expert_bias");
  check.rank("bias", bias, 1);
  check_vector(check, "bias", bias, bias.size(0), DType::kFloat32);
  check_vector(check, "rows_per_expert", rows_per_expert, bias.size(0), DType::kInt32);
  choose_backend(context, "update_expert_bias")
      .update_expert_bias(context, bias, rows_per_expert, rate);
}

}  // namespace sonicmoe
