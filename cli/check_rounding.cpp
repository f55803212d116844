// Token rounding against the definition.
#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "cli/check.hpp"
#include "cli/router_case.hpp"

namespace sonicmoe::cli {

namespace {

// What round_tokens_forward and round_select write, with room for every pair. Comparisons take it
// on the host.
struct Rounded {
  Tensor tokens, experts, rows, workspace;

  Rounded(const Context& context, std::int64_t T, std::int64_t E, std::int64_t K,
          const RoundingOptions& options)
      : tokens(DType::kInt32, {rounded_capacity(T, E, K, options)}, context.device),
        experts(DType::kInt32, {rounded_capacity(T, E, K, options)}, context.device),
        rows(DType::kInt32, {E}, context.device),
        workspace(DType::kUInt8,
                  {static_cast<std::int64_t>(round_tokens_workspace_bytes(context, T, E, K))},
                  context.device) {}

  Rounded to_host() const {
    Rounded copy = *this;
    for (Tensor* tensor : {&copy.tokens, &copy.experts, &copy.rows, &copy.workspace}) {
      *tensor = tensor->to_host();
    }
    return copy;
  }
};

RoundingOptions random_rounding(Random& random, std::int64_t T) {
  RoundingOptions options;
  options.tile = random.integer(1, std::min<std::int64_t>(T, 16));
  options.policy = static_cast<RoundingPolicy>(random.integer(0, 5));
  options.seed = random.next();
  return options;
}

std::string to_string(const RoundingOptions& options) {
  return std::string(name_of(options.policy)) + " tile=" + std::to_string(options.tile);
}

void compare_rounded_rows(Findings& findings, std::int64_t tile, const Tensor& rows_before,
                          const Tensor& after) {
  const Tensor before = rows_before.to_host();
  for (std::size_t e = 0; e < before.count(); ++e) {
    const std::int32_t f = before.as<std::int32_t>()[e], rounded = after.as<std::int32_t>()[e];
    findings.require(
        rounded % tile == 0 && std::abs(rounded - f) < tile,
        "rows_per_expert: " + std::to_string(f) + " became " + std::to_string(rounded));
  }
}

// Weights and the gradient of sum grad * weight over the listed pairs, token by token.
void compare_pairs(Findings& findings, const RouterCase& c, const Rounded& rounded,
                   const Tensor& topk_ids, const Tensor& weights, const Tensor& grad,
                   const Tensor& grad_logits) {
  const auto* experts = rounded.experts.as<std::int32_t>();
  Tensor expected(DType::kFloat32, {static_cast<std::int64_t>(weights.count())});
  Tensor expected_grad(DType::kFloat32, {c.T, c.E});
  expected.fill(0.0f);
  for (std::int64_t t = 0; t < c.T; ++t) {
    const auto ids = ids_of(topk_ids, t);
    const auto logits = oracle::logits_row(c.logits, t);
    std::vector<std::size_t> pairs;
    for (std::size_t p = 0; p < rounded.tokens.count(); ++p) {
      if (rounded.tokens.as<std::int32_t>()[p] == t) pairs.push_back(p);
    }
    for (const std::size_t p : pairs) {
      expected.set(p, static_cast<float>(oracle::weight(c.options, logits, ids, experts[p])));
    }
    const auto loss = [&](const oracle::Row& row) {
      double sum = 0.0;
      for (const std::size_t p : pairs) {
        sum += grad.at(p) * oracle::weight(c.options, row, ids, experts[p]);
      }
      return sum;
    };
    set_row(expected_grad, t, oracle::gradient(loss, logits));
  }
  findings.compare("pair_weights", weights, expected, kRouterTolerance, /*may_vanish=*/true);
  compare_gradient(findings, grad_logits, expected_grad);
}

// Scores, and the tokens that each expert has by plain top-K.
struct Choice {
  std::int64_t T, E, K;
  Tensor scores, topk_ids;
  std::vector<std::set<std::int64_t>> chosen;

  Choice(Random& random, std::int64_t tokens, std::int64_t experts, std::int64_t top_k,
         bool many_ties)
      : T(tokens),
        E(experts),
        K(top_k),
        scores(DType::kFloat32, {T, E}),
        topk_ids(DType::kInt32, {T, K}),
        chosen(static_cast<std::size_t>(E)) {
    for (std::size_t i = 0; i < scores.count(); ++i) {
      scores.set(i, many_ties ? static_cast<float>(random.integer(0, 8)) / 8.0f
                              : static_cast<float>(random.uniform()));
    }
    for (std::int64_t t = 0; t < T; ++t) {
      const auto ids = oracle::top_k(oracle::logits_row(scores, t), K);
      for (std::int64_t k = 0; k < K; ++k) {
        const std::int64_t e = ids[static_cast<std::size_t>(k)];
        topk_ids.as<std::int32_t>()[t * K + k] = static_cast<std::int32_t>(e);
        chosen[static_cast<std::size_t>(e)].insert(t);
      }
    }
  }

  double score(std::int64_t t, std::size_t e) const {
    return static_cast<double>(scores.at(static_cast<std::size_t>(t * E) + e));
  }

  // All tokens: those chosen first, then by score, then by token.
  std::vector<std::int64_t> ranking(std::size_t e) const {
    std::vector<std::int64_t> tokens;
    for (std::int64_t t = 0; t < T; ++t) tokens.push_back(t);
    std::stable_sort(tokens.begin(), tokens.end(), [&](std::int64_t a, std::int64_t b) {
      const bool a_chosen = chosen[e].contains(a), b_chosen = chosen[e].contains(b);
      return a_chosen != b_chosen ? a_chosen : score(a, e) > score(b, e);
    });
    return tokens;
  }
};

// Rows of every expert by the policy's definition; where it draws lots, `actual` says which of the
// two neighbours it took.
std::vector<std::int64_t> expected_rows(const Choice& choice, const RoundingOptions& options,
                                        const Tensor& actual) {
  const std::int64_t tile = options.tile;
  std::vector<std::int64_t> rows;
  std::vector<bool> up_changes_less;
  for (std::size_t e = 0; e < choice.chosen.size(); ++e) {
    const auto ranking = choice.ranking(e);
    const auto f = static_cast<std::int64_t>(choice.chosen[e].size());
    const std::int64_t down = f / tile * tile;
    const std::int64_t up = std::min(choice.T, down + tile);
    const auto sum = [&](std::int64_t first, std::int64_t last) {
      double total = 0.0;
      for (; first < last; ++first) {
        total += choice.score(ranking[static_cast<std::size_t>(first)], e);
      }
      return total;
    };
    rows.push_back(f);
    up_changes_less.push_back(sum(f, up) < sum(down, f));
  }
  auto expected = oracle::rounded_rows(options.policy, tile, choice.T, rows, up_changes_less);
  if (options.policy == RoundingPolicy::kStochastic) {
    for (std::size_t e = 0; e < expected.size(); ++e) {
      const std::int64_t down = rows[e] / tile * tile;
      const std::int64_t got = actual.as<std::int32_t>()[e];
      const bool up = got == down + tile && down != rows[e] && got <= choice.T;
      expected[e] = up ? got : down;
    }
  }
  return expected;
}

// The first `rows[e]` tokens of every ranking, in input order, then -1.
void compare_lists(Findings& findings, const Choice& choice, const Rounded& rounded,
                   const std::vector<std::int64_t>& rows) {
  const auto* tokens = rounded.tokens.as<std::int32_t>();
  const auto* experts = rounded.experts.as<std::int32_t>();
  std::size_t p = 0;
  for (std::size_t e = 0; e < rows.size(); ++e) {
    auto kept = choice.ranking(e);
    kept.resize(static_cast<std::size_t>(rows[e]));
    std::sort(kept.begin(), kept.end());
    for (const std::int64_t t : kept) {
      if (tokens[p] != t || experts[p] != static_cast<std::int64_t>(e)) {
        findings.add("pair " + std::to_string(p) + " differs");
        return;
      }
      ++p;
    }
  }
  for (; p < rounded.tokens.count(); ++p) {
    if (tokens[p] != -1 || experts[p] != -1) {
      findings.add("unused pair " + std::to_string(p) + " is not -1");
      return;
    }
  }
}

}  // namespace

Findings check_round_tokens(const Context& context, Random& random) {
  const RouterCase c(random, 1), placed = c.to(context.device);
  const std::int64_t K = c.options.top_k;
  RoundTokensForwardArgs args;
  args.options = placed.options;
  args.rounding = random_rounding(random, c.T);
  Findings findings;
  findings.description = "round_tokens " + c.to_string() + " " + to_string(args.rounding);
  const Rounded rounded(context, c.T, c.E, K, args.rounding);
  const auto P = static_cast<std::int64_t>(rounded.tokens.count());
  const Tensor weights(DType::kFloat32, {P}, context.device);
  const Tensor topk_ids(DType::kInt32, {c.T, K}, context.device);
  const Tensor before(DType::kInt32, {c.E}, context.device);
  args.logits = placed.logits.view();
  args.token_ids = rounded.tokens.view();
  args.expert_ids = rounded.experts.view();
  args.pair_weights = weights.view();
  args.topk_ids = topk_ids.view();
  args.rows_per_expert = rounded.rows.view();
  args.rows_per_expert_before = before.view();
  args.workspace = rounded.workspace.view();
  round_tokens_forward(context, args);

  compare_top_k(findings, c, topk_ids);
  if (!findings.passed()) return findings;
  compare_counts(findings, "rows_per_expert_before", before, count_ids(topk_ids, c.E));
  const Rounded results = rounded.to_host();
  compare_counts(findings, "rows_per_expert", results.rows, count_ids(results.experts, c.E));
  compare_rounded_rows(findings, args.rounding.tile, before, results.rows);

  Tensor grad(DType::kFloat32, {P});
  grad.fill_random(random);
  const Tensor placed_grad = grad.to(context.device);
  const Tensor grad_logits(DType::kFloat32, {c.T, c.E}, context.device);
  round_tokens_backward(
      context, {placed.options, placed.logits.view(), topk_ids.view(), rounded.tokens.view(),
                rounded.experts.view(), placed_grad.view(), grad_logits.view()});
  compare_pairs(findings, c, results, topk_ids.to_host(), weights, grad, grad_logits);
  return findings;
}

Findings check_round_select(const Context& context, Random& random) {
  const std::int64_t T = random.integer(1, 64), E = random.integer(1, 16);
  const std::int64_t K = random.integer(1, std::min<std::int64_t>(E, 6));
  const bool many_ties = random.chance(0.5);
  RoundSelectArgs args;
  args.rounding = random_rounding(random, T);
  Findings findings;
  findings.description = "round_select T=" + std::to_string(T) + " E=" + std::to_string(E) +
                         " K=" + std::to_string(K) + " " + to_string(args.rounding) +
                         (many_ties ? " ties" : "");
  const Choice choice(random, T, E, K, many_ties);
  const Rounded rounded(context, T, E, K, args.rounding);
  const Tensor scores = choice.scores.to(context.device);
  const Tensor topk_ids = choice.topk_ids.to(context.device);
  args.scores = scores.view();
  args.topk_ids = topk_ids.view();
  args.token_ids = rounded.tokens.view();
  args.expert_ids = rounded.experts.view();
  args.rows_per_expert = rounded.rows.view();
  args.workspace = rounded.workspace.view();
  round_select(context, args);

  const Rounded results = rounded.to_host();
  const auto expected = expected_rows(choice, args.rounding, results.rows);
  compare_counts(findings, "rows_per_expert", results.rows, expected);
  if (findings.passed()) compare_lists(findings, choice, results, expected);
  return findings;
}

}  // namespace sonicmoe::cli
