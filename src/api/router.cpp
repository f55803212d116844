// Validation and dispatch of the router's operations.
#include "sonicmoe/router.hpp"

#include "api/arguments.hpp"
#include "api/checks.hpp"
#include "core/backend.hpp"
#include "core/integers.hpp"
#include "core/workspace.hpp"

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

void check_rows(const Check& check, const char* name, const ConstTensorView& rows,
                std::int64_t num_experts) {
  if (rows.defined()) check_vector(check, name, rows, num_experts, DType::kInt32);
}

// The outputs that round_tokens_forward and round_select have in common.
template <class Args>
void check_pair_list(const Check& check, const Args& args, std::int64_t num_tokens,
                     std::int64_t num_experts, std::int64_t top_k) {
  const std::int64_t pairs = checked_capacity(check, num_tokens, num_experts, top_k, args.rounding);
  check_seed(check, args.rounding);
  check_rows(check, "targets", args.targets, num_experts);
  check_vector(check, "token_ids", args.token_ids, pairs, DType::kInt32);
  check_vector(check, "expert_ids", args.expert_ids, pairs, DType::kInt32);
  check_rows(check, "rows_per_expert", args.rows_per_expert, num_experts);
  check_rows(check, "rows_per_expert_before", args.rows_per_expert_before, num_experts);
}

void check_loss_forward(const Check& check, const LossArgs& args) {
  check_vector(check, "loss", args.loss, 1, DType::kFloat32);
  check_memory(check, args);
}

void check_loss_backward(const Check& check, const LossArgs& args) {
  check_vector(check, "grad_loss", args.grad_loss, 1, DType::kFloat32);
  check_like_logits(check, "grad_logits", args.grad_logits, args.logits);
  check_memory(check, args);
}

void check_balance(const Check& check, Scoring scoring, std::int64_t top_k,
                   const ConstTensorView& logits, const ConstTensorView& rows) {
  check_logits(check, logits);
  check.enumerator("scoring", scoring);
  check.between("top_k", top_k, 1, logits.size(1));
  check_vector(check, "rows_per_expert", rows, logits.size(1), DType::kInt32);
}

}  // namespace

void check_router_sizes(const Check& check, std::int64_t num_tokens, std::int64_t num_experts,
                        std::int64_t top_k) {
  check.between("num_tokens", num_tokens, 0, kMostRows);
  check.between("num_experts", num_experts, 1, kMostRows);
  check.between("top_k", top_k, 1, num_experts);
  check.product("num_tokens * num_experts", {num_tokens, num_experts});
}

std::int64_t checked_capacity(const Check& check, std::int64_t num_tokens, std::int64_t num_experts,
                              std::int64_t top_k, const RoundingOptions& rounding) {
  check_router_sizes(check, num_tokens, num_experts, top_k);
  check.enumerator("policy", rounding.policy);
  check.that(rounding.tile >= 1, "tile", "at least 1", text(rounding.tile));
  check.that(rounding.tile <= num_tokens, "tile",  // else no row could be kept
             "at most the number of tokens, " + text(num_tokens), text(rounding.tile));
  const std::int64_t more_per_expert = [&] {
    switch (rounding.policy) {
      case RoundingPolicy::kDown:
      case RoundingPolicy::kBalanced:
        return std::int64_t{0};
      case RoundingPolicy::kNearest:
        return rounding.tile / 2;
      case RoundingPolicy::kUp:
      case RoundingPolicy::kStochastic:
      case RoundingPolicy::kNearestScore:
        return rounding.tile - 1;
    }
    return std::int64_t{0};
  }();
  const std::int64_t more = rounding.policy == RoundingPolicy::kBalanced
                                ? rounding.tile / 2
                                : saturating_mul(num_experts, more_per_expert);
  const std::int64_t pairs = saturating_add(saturating_mul(num_tokens, top_k), more);
  check.that(pairs <= kMostRows, "num_tokens",
             "at most " + text(kMostRows) + " pairs of tokens and experts, rounded up",
             text(num_tokens) + " * " + text(top_k) + " + " + text(more));
  return pairs;
}

void check_seed(const Check& check, const RoundingOptions& rounding) {
  if (rounding.seed_tensor.defined()) {
    check_vector(check, "seed_tensor", rounding.seed_tensor, 1, DType::kInt64);
  }
}

std::int64_t rounded_capacity(std::int64_t num_tokens, std::int64_t num_experts, std::int64_t top_k,
                              const RoundingOptions& rounding) {
  return checked_capacity(Check("rounded_capacity", Device{}), num_tokens, num_experts, top_k,
                          rounding);
}

void check_router_options(const Check& check, const RouterOptions& options,
                          std::int64_t num_experts) {
  check.enumerator("scoring", options.scoring);
  check.finite("scale", options.scale);
  check.between("top_k", options.top_k, 1, num_experts);
  const ScoringTraits& traits = traits_of(options.scoring);
  const std::string with_scoring = " with " + std::string(traits.name);
  check.that(
      traits.renormalization != Renormalization::kAlways || options.renormalize.value_or(true),
      "renormalize", "unset or true" + with_scoring, "false");
  if (options.selection_bias.defined()) {
    check.that(traits.biased, "selection_bias", "none" + with_scoring,
               options.selection_bias.describe());
    check_vector(check, "selection_bias", options.selection_bias, num_experts, DType::kFloat32);
  }
  check.that(options.num_groups >= 1 && num_experts % options.num_groups == 0, "num_groups",
             "a divisor of " + text(num_experts), text(options.num_groups));
  check.that(traits.biased || options.num_groups == 1, "num_groups", "1" + with_scoring,
             text(options.num_groups));
  check.between("top_groups", options.top_groups, 1, options.num_groups);
  const std::int64_t selectable = options.top_groups * (num_experts / options.num_groups);
  check.that(options.top_k <= selectable, "top_k",
             "at most " + text(selectable) + ", the experts of top_groups groups",
             text(options.top_k));
}

void check_route_forward(const Check& check, const RouteForwardArgs& args, const char* weights) {
  check_logits(check, args.logits);
  const std::int64_t num_experts = args.logits.size(1);
  check_router_options(check, args.options, num_experts);
  check_router_sizes(check, args.logits.size(0), num_experts, args.options.top_k);
  check_matrix(check, "topk_ids", args.topk_ids, {DType::kInt32, DType::kInt64});
  check.shape("topk_ids", args.topk_ids, {args.logits.size(0), args.options.top_k});
  check_matrix(check, weights, args.topk_weights, {DType::kFloat32});
  check.shape_like(weights, args.topk_weights, args.topk_ids);
  check_rows(check, "rows_per_expert", args.rows_per_expert, num_experts);
}

void route_forward(const Context& context, const RouteForwardArgs& args) {
  run_operation("route_forward", context, [&](const Check& check) {
    check_route_forward(check, args);
    check_memory(check, args);
    choose_backend(context, check.operation()).route_forward(context, args);
  });
}

void check_route_backward(const Check& check, const RouteBackwardArgs& args) {
  check_logits(check, args.logits);
  check_router_options(check, args.options, args.logits.size(1));
  check_router_sizes(check, args.logits.size(0), args.logits.size(1), args.options.top_k);
  check_matrix(check, "topk_ids", args.topk_ids, {DType::kInt32, DType::kInt64});
  check.shape("topk_ids", args.topk_ids, {args.logits.size(0), args.options.top_k});
  check_matrix(check, "grad_topk_weights", args.grad_topk_weights, {DType::kFloat32});
  check.shape_like("grad_topk_weights", args.grad_topk_weights, args.topk_ids);
  check_like_logits(check, "grad_logits", args.grad_logits, args.logits);
}

void route_backward(const Context& context, const RouteBackwardArgs& args) {
  run_operation("route_backward", context, [&](const Check& check) {
    check_route_backward(check, args);
    check_memory(check, args);
    choose_backend(context, check.operation()).route_backward(context, args);
  });
}

std::size_t round_tokens_workspace_bytes(const Context& context, std::int64_t num_tokens,
                                         std::int64_t num_experts, std::int64_t top_k) {
  return answer("round_tokens_workspace_bytes", context, [&](const Check& check) {
    check_router_sizes(check, num_tokens, num_experts, top_k);
    return choose_backend(context, check.operation())
        .round_tokens_workspace_bytes(context, num_tokens, num_experts, top_k);
  });
}

void check_round_tokens_forward(const Check& check, const RoundTokensForwardArgs& args,
                                const char* weights) {
  check_logits(check, args.logits);
  const std::int64_t num_tokens = args.logits.size(0);
  const std::int64_t num_experts = args.logits.size(1);
  check_router_options(check, args.options, num_experts);
  check_pair_list(check, args, num_tokens, num_experts, args.options.top_k);
  check_vector(check, weights, args.pair_weights, args.token_ids.size(0), DType::kFloat32);
  check_matrix(check, "topk_ids", args.topk_ids, {DType::kInt32});
  check.shape("topk_ids", args.topk_ids, {num_tokens, args.options.top_k});
}

void round_tokens_forward(const Context& context, const RoundTokensForwardArgs& args) {
  run_operation("round_tokens_forward", context, [&](const Check& check) {
    check_round_tokens_forward(check, args);
    const Backend& backend = choose_backend(context, check.operation());
    const std::size_t bytes = backend.round_tokens_workspace_bytes(
        context, args.logits.size(0), args.logits.size(1), args.options.top_k);
    check.buffer("workspace", args.workspace, bytes, WorkspaceCarver::kAlignment);
    check_memory(check, args);
    backend.round_tokens_forward(context, args);
  });
}

void round_select(const Context& context, const RoundSelectArgs& args) {
  run_operation("round_select", context, [&](const Check& check) {
    check_matrix(check, "scores", args.scores, {DType::kFloat32});
    const std::int64_t num_tokens = args.scores.size(0);
    const std::int64_t num_experts = args.scores.size(1);
    check.that(num_experts > 0, "scores", "at least one expert", args.scores.describe());
    check_matrix(check, "topk_ids", args.topk_ids, {DType::kInt32});
    const std::int64_t top_k = args.topk_ids.size(1);
    check.shape("topk_ids", args.topk_ids, {num_tokens, top_k});
    check.between("topk_ids", top_k, 1, num_experts);
    check_pair_list(check, args, num_tokens, num_experts, top_k);
    const Backend& backend = choose_backend(context, check.operation());
    const std::size_t bytes =
        backend.round_tokens_workspace_bytes(context, num_tokens, num_experts, top_k);
    check.buffer("workspace", args.workspace, bytes, WorkspaceCarver::kAlignment);
    check_memory(check, args);
    backend.round_select(context, args);
  });
}

void check_round_tokens_backward(const Check& check, const RoundTokensBackwardArgs& args) {
  check_logits(check, args.logits);
  check_router_options(check, args.options, args.logits.size(1));
  check_router_sizes(check, args.logits.size(0), args.logits.size(1), args.options.top_k);
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
  run_operation("round_tokens_backward", context, [&](const Check& check) {
    check_round_tokens_backward(check, args);
    check_memory(check, args);
    choose_backend(context, check.operation()).round_tokens_backward(context, args);
  });
}

void load_balancing_loss_forward(const Context& context, Scoring scoring, std::int64_t top_k,
                                 ConstTensorView logits, ConstTensorView rows_per_expert,
                                 TensorView loss) {
  run_operation("load_balancing_loss_forward", context, [&](const Check& check) {
    check_balance(check, scoring, top_k, logits, rows_per_expert);
    check_loss_forward(check, {logits, rows_per_expert, {}, loss, {}});
    choose_backend(context, check.operation())
        .load_balancing_loss_forward(context, scoring, top_k, logits, rows_per_expert, loss);
  });
}

void load_balancing_loss_backward(const Context& context, Scoring scoring, std::int64_t top_k,
                                  ConstTensorView logits, ConstTensorView rows_per_expert,
                                  ConstTensorView grad_loss, TensorView grad_logits) {
  run_operation("load_balancing_loss_backward", context, [&](const Check& check) {
    check_balance(check, scoring, top_k, logits, rows_per_expert);
    check_loss_backward(check, {logits, rows_per_expert, grad_loss, {}, grad_logits});
    choose_backend(context, check.operation())
        .load_balancing_loss_backward(context, scoring, top_k, logits, rows_per_expert, grad_loss,
                                      grad_logits);
  });
}

void router_z_loss_forward(const Context& context, ConstTensorView logits, TensorView loss) {
  run_operation("router_z_loss_forward", context, [&](const Check& check) {
    check_logits(check, logits);
    check_loss_forward(check, {logits, {}, {}, loss, {}});
    choose_backend(context, check.operation()).router_z_loss_forward(context, logits, loss);
  });
}

void router_z_loss_backward(const Context& context, ConstTensorView logits,
                            ConstTensorView grad_loss, TensorView grad_logits) {
  run_operation("router_z_loss_backward", context, [&](const Check& check) {
    check_logits(check, logits);
    check_loss_backward(check, {logits, {}, grad_loss, {}, grad_logits});
    choose_backend(context, check.operation())
        .router_z_loss_backward(context, logits, grad_loss, grad_logits);
  });
}

void update_expert_bias(const Context& context, TensorView selection_bias,
                        ConstTensorView rows_per_expert, float rate) {
  run_operation("update_expert_bias", context, [&](const Check& check) {
    check.rank("selection_bias", selection_bias, 1);
    const std::int64_t num_experts = selection_bias.size(0);
    check_vector(check, "selection_bias", selection_bias, num_experts, DType::kFloat32);
    check_vector(check, "rows_per_expert", rows_per_expert, num_experts, DType::kInt32);
    check.finite("rate", rate);
    check_memory(check, ExpertBiasArgs{selection_bias, rows_per_expert});
    choose_backend(context, check.operation())
        .update_expert_bias(context, selection_bias, rows_per_expert, rate);
  });
}

}  // namespace sonicmoe
