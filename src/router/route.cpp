// Top-K routing: forward and backward.
#include <algorithm>
#include <vector>

#include "core/parallel.hpp"
#include "router/host_router.hpp"
#include "router/scoring.hpp"
#include "router/token_ids.hpp"
#include "sonicmoe/error.hpp"

namespace sonicmoe {
namespace {

// Routes tokens [begin, end).
template <class Id>
void route_block(const RouteForwardArgs& args, std::int64_t begin, std::int64_t end,
                 LowestToken& unscorable) {
  const std::int64_t num_experts = args.logits.size(1);
  const std::int64_t top_k = args.options.top_k;
  TokenRouter router(args.options, num_experts);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(top_k));
  for (std::int64_t t = begin; t < end; ++t) {
    const float* logits = args.logits.as<float>() + t * num_experts;
    if (!router.load(logits)) {
      unscorable.report(t);
      continue;
    }
    router.select(ids.data());
    const TokenNormalizer normalizer = router.normalizer(ids.data());
    Id* out_ids = args.topk_ids.as<Id>() + t * top_k;
    float* out_weights = args.topk_weights.as<float>() + t * top_k;
    for (std::int64_t k = 0; k < top_k; ++k) {
      const std::int32_t id = ids[static_cast<std::size_t>(k)];
      out_ids[k] = id;
      out_weights[k] = weight_of(args.options, normalizer, logits[id]);
    }
  }
}

template <class Id>
void count_rows(ConstTensorView topk_ids, TensorView rows_per_expert) {
  auto* rows = rows_per_expert.as<std::int32_t>();
  std::fill_n(rows, rows_per_expert.numel(), 0);
  const Id* ids = topk_ids.as<Id>();
  for (std::int64_t i = 0; i < topk_ids.numel(); ++i) ++rows[ids[i]];
}

}  // namespace

void HostRouterBackend::route_forward(const Context& context, const RouteForwardArgs& args) const {
  const std::int64_t num_tokens = args.logits.size(0);
  const std::int64_t num_experts = args.logits.size(1);
  check_selection_bias("route_forward", args.options, num_experts);
  LowestToken unscorable;
  visit_id_dtype(args.topk_ids.dtype(), [&]<class Id>(IdTag<Id>) {
    parallel_for_tokens(context, num_tokens, [&](std::int64_t begin, std::int64_t end) {
      route_block<Id>(args, begin, end, unscorable);
    });
    if (unscorable.any()) {
      fail_unscorable("route_forward", args.logits.as<float>(), num_experts, unscorable.value());
    }
    if (args.rows_per_expert.defined()) count_rows<Id>(args.topk_ids, args.rows_per_expert);
  });
}

void HostRouterBackend::route_backward(const Context& context,
                                       const RouteBackwardArgs& args) const {
  const std::int64_t num_tokens = args.logits.size(0);
  const std::int64_t num_experts = args.logits.size(1);
  const std::int64_t top_k = args.options.top_k;
  LowestToken out_of_range;
  parallel_for_tokens(context, num_tokens, [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::int64_t> ids(static_cast<std::size_t>(top_k));
    std::vector<double> gradient(static_cast<std::size_t>(num_experts));
    for (std::int64_t t = begin; t < end; ++t) {
      if (!load_ids(args.topk_ids, t, num_experts, ids.data())) {
        out_of_range.report(t);
        continue;
      }
      const float* grad_weights = args.grad_topk_weights.as<float>() + t * top_k;
      std::fill(gradient.begin(), gradient.end(), 0.0);
      for (std::int64_t k = 0; k < top_k; ++k) {
        gradient[static_cast<std::size_t>(ids[static_cast<std::size_t>(k)])] += grad_weights[k];
      }
      weight_backward(args.options, num_experts, args.logits.as<float>() + t * num_experts,
                      ids.data(), gradient.data());
      float* out = args.grad_logits.as<float>() + t * num_experts;
      std::transform(gradient.begin(), gradient.end(), out,
                     [](double value) { return static_cast<float>(value); });
    }
  });
  if (out_of_range.any()) {
    fail_token_ids("route_backward", args.topk_ids, num_experts, out_of_range.value());
  }
}

}  // namespace sonicmoe
