// A naive derivation of token rounding with full sorts, and calls of the library.
#pragma once

#include "math/philox.hpp"
#include "router_test_support.hpp"

namespace sonicmoe::router_test {

using enum RoundingPolicy;
inline constexpr RoundingPolicy kPolicies[] = {kNearest,    kUp,       kDown,
                                               kStochastic, kBalanced, kNearestScore};

inline RoundingOptions rounding(std::int64_t tile, RoundingPolicy policy, std::uint64_t seed = 0) {
  RoundingOptions options;
  options.tile = tile;
  options.policy = policy;
  options.seed = seed;
  return options;
}

inline std::int64_t workspace_bytes(std::int64_t num_tokens, std::int64_t num_experts,
                                    std::int64_t top_k) {
  return static_cast<std::int64_t>(
      round_tokens_workspace_bytes(context(), num_tokens, num_experts, top_k));
}

// ---------------------------------------------------------------------- the naive derivation

struct Selection {
  std::vector<std::int32_t> tokens, experts;  // without unused places
  std::vector<std::int32_t> before, after;    // [E]
};

inline std::int64_t nearest_multiple(std::int64_t f, std::int64_t tile) {
  const std::int64_t low = f / tile * tile;
  const std::int64_t high = f == low ? low : low + tile;
  if (f - low != high - f) return f - low < high - f ? low : high;
  return low / tile % 2 == 0 ? low : high;
}

/// `scores` [T, E], `ids` [T, K].
inline Selection naive_rounding(const RoundingOptions& options, std::int64_t num_tokens,
                                std::int64_t num_experts, const std::vector<float>& scores,
                                const std::vector<std::int32_t>& ids) {
  Selection result;
  const std::int64_t top_k = static_cast<std::int64_t>(ids.size()) / num_tokens;
  const std::int64_t tile = options.tile;
  std::int64_t carry = 0;
  for (std::int64_t e = 0; e < num_experts; ++e) {
    std::vector<bool> chose(at(num_tokens));
    for (std::size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] == e) chose[i / at(top_k)] = true;
    }
    const auto score = [&](std::int64_t t) { return scores[at(t * num_experts + e)]; };
    std::vector<std::int64_t> ranking(at(num_tokens));
    std::iota(ranking.begin(), ranking.end(), 0);
    std::stable_sort(ranking.begin(), ranking.end(), [&](std::int64_t a, std::int64_t b) {
      if (chose[at(a)] != chose[at(b)]) return bool{chose[at(a)]};
      return score(a) > score(b);
    });
    const std::int64_t f = std::count(chose.begin(), chose.end(), true);
    const std::int64_t low = f / tile * tile;
    const std::int64_t high = (f + tile - 1) / tile * tile;
    std::int64_t rounded = low;
    if (high <= num_tokens && high != low) {
      // Quarters in these tests: double sums are exact.
      double dropped = 0.0;
      double added = 0.0;
      for (std::int64_t i = low; i < f; ++i) dropped += double{score(ranking[at(i)])};
      for (std::int64_t i = f; i < high; ++i) added += double{score(ranking[at(i)])};
      const double draw = rounding_bits(options.seed, static_cast<std::uint32_t>(e)) / 4294967296.0;
      const std::int64_t size_down = std::abs(carry + low - f);
      const std::int64_t size_up = std::abs(carry + high - f);
      switch (options.policy) {
        case kNearest:
          rounded = nearest_multiple(f, tile);
          break;
        case kUp:
          rounded = high;
          break;
        case kDown:
          rounded = low;
          break;
        case kStochastic:
          rounded = draw < static_cast<double>(f - low) / static_cast<double>(tile) ? high : low;
          break;
        case kBalanced:
          rounded = size_down == size_up  ? nearest_multiple(f, tile)
                    : size_up < size_down ? high
                                          : low;
          break;
        case kNearestScore:
          rounded = std::abs(added) < std::abs(dropped) ? high : low;
          break;
      }
    }
    carry += rounded - f;
    result.before.push_back(static_cast<std::int32_t>(f));
    result.after.push_back(static_cast<std::int32_t>(rounded));
    std::vector<std::int64_t> kept(ranking.begin(), ranking.begin() + rounded);
    std::sort(kept.begin(), kept.end());
    for (const std::int64_t t : kept) {
      result.tokens.push_back(static_cast<std::int32_t>(t));
      result.experts.push_back(static_cast<std::int32_t>(e));
    }
  }
  return result;
}

template <class T>
std::vector<T> padded(std::vector<T> values, std::int64_t length, T filler) {
  EXPECT_LE(values.size(), at(length));
  values.resize(at(length), filler);
  return values;
}

// -------------------------------------------------------------------------- calls of the library

struct Selected {
  std::int64_t capacity;
  Buffer<float> scores;
  Buffer<std::int32_t> ids, tokens, experts, after, before;
  Buffer<std::uint8_t> workspace;
  RoundSelectArgs args;

  Selected(const RoundingOptions& options, std::int64_t num_tokens, std::int64_t num_experts,
           std::int64_t top_k, const std::vector<float>& given_scores,
           const std::vector<std::int32_t>& given_ids)
      : capacity(rounded_capacity(num_tokens, num_experts, top_k, options)),
        scores(given_scores, {num_tokens, num_experts}),
        ids(given_ids, {num_tokens, top_k}),
        tokens({capacity}),
        experts({capacity}),
        after({num_experts}),
        before({num_experts}),
        workspace({workspace_bytes(num_tokens, num_experts, top_k)}) {
    args.rounding = options;
    args.scores = scores.view();
    args.topk_ids = ids.view();
    args.token_ids = tokens.view();
    args.expert_ids = experts.view();
    args.rows_per_expert = after.view();
    args.rows_per_expert_before = before.view();
    args.workspace = workspace.view();
  }
  void run(int threads = 2) { round_select(context(threads), args); }
  void expect(const Selection& expected) {
    EXPECT_EQ(before.values(), expected.before);
    EXPECT_EQ(after.values(), expected.after);
    EXPECT_EQ(tokens.values(), padded(expected.tokens, capacity, -1));
    EXPECT_EQ(experts.values(), padded(expected.experts, capacity, -1));
  }
};

struct Rounded {
  Inputs inputs;
  std::int64_t capacity;
  Buffer<std::int32_t> tokens, experts, ids, after, before;
  Buffer<float> weights;
  Buffer<std::uint8_t> workspace;
  RoundTokensForwardArgs args;

  Rounded(const Problem& p, const RoundingOptions& options)
      : inputs(p),
        capacity(rounded_capacity(p.num_tokens, p.num_experts, p.options.top_k, options)),
        tokens({capacity}),
        experts({capacity}),
        ids({p.num_tokens, p.options.top_k}),
        after({p.num_experts}),
        before({p.num_experts}),
        weights({capacity}),
        workspace({workspace_bytes(p.num_tokens, p.num_experts, p.options.top_k)}) {
    args.options = inputs.options;
    args.rounding = options;
    args.logits = inputs.logits.view();
    args.token_ids = tokens.view();
    args.expert_ids = experts.view();
    args.pair_weights = weights.view();
    args.topk_ids = ids.view();
    args.rows_per_expert = after.view();
    args.rows_per_expert_before = before.view();
    args.workspace = workspace.view();
  }
  void run(int threads = 2) { round_tokens_forward(context(threads), args); }
  std::vector<float> backward(const std::vector<float>& grad_weights, int threads = 2) {
    const Buffer<float> grad(grad_weights, {capacity});
    const Buffer<float> grad_logits({args.logits.size(0), args.logits.size(1)});
    RoundTokensBackwardArgs back;
    back.options = inputs.options;
    back.logits = inputs.logits.view();
    back.topk_ids = ids.view();
    back.token_ids = tokens.view();
    back.expert_ids = experts.view();
    back.grad_pair_weights = grad.view();
    back.grad_logits = grad_logits.view();
    round_tokens_backward(context(threads), back);
    return grad_logits.values();
  }
};

}  // namespace sonicmoe::router_test
