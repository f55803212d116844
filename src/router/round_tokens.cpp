// Token rounding: forward, the selection alone, and backward.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "core/parallel.hpp"
#include "router/host_router.hpp"
#include "router/scoring.hpp"
#include "router/token_ids.hpp"
#include "router/token_rounding.hpp"
#include "sonicmoe/error.hpp"

namespace sonicmoe {
namespace {

// Token choice of tokens [begin, end): top-K ids, what their weights need, and the scores by which
// the experts rank them.
void choose_block(const RoundTokensForwardArgs& args, const RoundingBuffers& buffers,
                  std::int64_t begin, std::int64_t end, LowestToken& unscorable) {
  const std::int64_t num_experts = buffers.num_experts;
  const std::int64_t top_k = args.options.top_k;
  TokenRouter router(args.options, num_experts);
  ColumnBlock block(buffers, begin, end);
  std::vector<float> scores(static_cast<std::size_t>(num_experts));
  for (std::int64_t t = begin; t < end; ++t) {
    if (!router.load(args.logits.as<float>() + t * num_experts)) {
      unscorable.report(t);
      continue;
    }
    std::int32_t* ids = args.topk_ids.as<std::int32_t>() + t * top_k;
    router.select(ids);
    buffers.normalizers[t] = router.normalizer(ids);
    router.ranking_scores(scores.data());
    block.set(t, scores.data(), ids, top_k);  // select() returns distinct ids in range
  }
  block.store();
}

void write_weights(const Context& context, const RoundTokensForwardArgs& args,
                   const RoundingBuffers& buffers) {
  const std::int64_t num_experts = buffers.num_experts;
  const auto* logits = args.logits.as<float>();
  const auto* token_ids = args.token_ids.as<std::int32_t>();
  auto* weights = args.pair_weights.as<float>();
  parallel_for(thread_count(context.num_threads), num_experts, [&](std::int64_t e, int) {
    for (std::int64_t i = buffers.starts[e]; i < buffers.starts[e + 1]; ++i) {
      const std::int64_t t = token_ids[i];
      weights[i] = weight_of(args.options, buffers.normalizers[t], logits[t * num_experts + e]);
    }
  });
  std::fill(weights + buffers.starts[num_experts], weights + args.pair_weights.numel(), 0.0f);
}

}  // namespace

std::size_t HostRouterBackend::round_tokens_workspace_bytes(const Context&, std::int64_t num_tokens,
                                                            std::int64_t num_experts,
                                                            std::int64_t) const {
  RoundingBuffers buffers;
  return carve_rounding_buffers(nullptr, num_tokens, num_experts, buffers);
}

void HostRouterBackend::round_tokens_forward(const Context& context,
                                             const RoundTokensForwardArgs& args) const {
  const std::int64_t num_tokens = args.logits.size(0);
  const std::int64_t num_experts = args.logits.size(1);
  check_selection_bias("round_tokens_forward", args.options, num_experts);
  check_targets("round_tokens_forward", args.targets, num_tokens, args.token_ids.numel());
  RoundingBuffers buffers;
  carve_rounding_buffers(args.workspace.data(), num_tokens, num_experts, buffers);
  LowestToken unscorable;
  parallel_for_tokens(context, num_tokens, [&](std::int64_t begin, std::int64_t end) {
    choose_block(args, buffers, begin, end, unscorable);
  });
  if (unscorable.any()) {
    fail_unscorable("round_tokens_forward", args.logits.as<float>(), num_experts,
                    unscorable.value());
  }
  select_rounded_rows(context, args.rounding, args.targets, buffers,
                      {args.token_ids.as<std::int32_t>(), args.expert_ids.as<std::int32_t>(),
                       args.token_ids.numel(), args.rows_per_expert, args.rows_per_expert_before});
  write_weights(context, args, buffers);
}

void HostRouterBackend::round_select(const Context& context, const RoundSelectArgs& args) const {
  const std::int64_t num_tokens = args.scores.size(0);
  const std::int64_t num_experts = args.scores.size(1);
  const std::int64_t top_k = args.topk_ids.size(1);
  check_targets("round_select", args.targets, num_tokens, args.token_ids.numel());
  RoundingBuffers buffers;
  carve_rounding_buffers(args.workspace.data(), num_tokens, num_experts, buffers);
  LowestToken with_nan;
  LowestToken with_bad_ids;
  parallel_for_tokens(context, num_tokens, [&](std::int64_t begin, std::int64_t end) {
    ColumnBlock block(buffers, begin, end);
    for (std::int64_t t = begin; t < end; ++t) {
      const float* scores = args.scores.as<float>() + t * num_experts;
      if (std::any_of(scores, scores + num_experts, [](float s) { return std::isnan(s); })) {
        with_nan.report(t);
      }
      if (!block.set(t, scores, args.topk_ids.as<std::int32_t>() + t * top_k, top_k)) {
        with_bad_ids.report(t);
      }
    }
    block.store();
  });
  if (with_nan.any()) {
    throw Error("round_select", "scores", "numbers",
                "NaN for token " + std::to_string(with_nan.value()));
  }
  if (with_bad_ids.any()) {
    fail_token_ids("round_select", args.topk_ids, num_experts, with_bad_ids.value());
  }
  select_rounded_rows(context, args.rounding, args.targets, buffers,
                      {args.token_ids.as<std::int32_t>(), args.expert_ids.as<std::int32_t>(),
                       args.token_ids.numel(), args.rows_per_expert, args.rows_per_expert_before});
}

void HostRouterBackend::round_tokens_backward(const Context& context,
                                              const RoundTokensBackwardArgs& args) const {
  const std::int64_t num_tokens = args.logits.size(0);
  const std::int64_t num_experts = args.logits.size(1);
  const std::int64_t top_k = args.options.top_k;
  auto* grad_logits = args.grad_logits.as<float>();

  // grad_logits first holds the weights' gradients as a matrix: the list is sorted by expert, the
  // normalisation runs over tokens.
  std::fill_n(grad_logits, num_tokens * num_experts, 0.0f);
  const auto* token_ids = args.token_ids.as<std::int32_t>();
  const auto* expert_ids = args.expert_ids.as<std::int32_t>();
  const auto* grad_weights = args.grad_pair_weights.as<float>();
  for (std::int64_t i = 0; i < args.token_ids.numel(); ++i) {
    const std::int64_t t = token_ids[i];
    const std::int64_t e = expert_ids[i];
    if (t < 0 || t >= num_tokens || e < 0 || e >= num_experts) continue;  // unused place
    grad_logits[t * num_experts + e] += grad_weights[i];
  }

  LowestToken out_of_range;
  parallel_for_tokens(context, num_tokens, [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::int64_t> ids(static_cast<std::size_t>(top_k));
    std::vector<double> gradient(static_cast<std::size_t>(num_experts));
    for (std::int64_t t = begin; t < end; ++t) {
      if (!load_ids(args.topk_ids, t, num_experts, ids.data())) {
        out_of_range.report(t);
        continue;
      }
      float* row = grad_logits + t * num_experts;
      std::copy_n(row, num_experts, gradient.begin());
      weight_backward(args.options, num_experts, args.logits.as<float>() + t * num_experts,
                      ids.data(), gradient.data());
      std::transform(gradient.begin(), gradient.end(), row,
                     [](double value) { return static_cast<float>(value); });
    }
  });
  if (out_of_range.any()) {
    fail_token_ids("round_tokens_backward", args.topk_ids, num_experts, out_of_range.value());
  }
}

}  // namespace sonicmoe
