// Token rounding against the definition.
#include <algorithm>
#include <set>
#include <string>

#include "cli/check.hpp"
#include "cli/router_case.hpp"

namespace sonicmoe::cli {

Findings check_round_tokens(const Context& context, Random& random) {
  const RouterCase c(random, 1);
  RoundTokensForwardArgs args;
  args.options = c.options;
  args.rounding.tile = random.integer(1, std::min<std::int64_t>(c.T, 16));
  args.rounding.policy = static_cast<RoundingPolicy>(random.integer(0, 5));
  args.rounding.seed = random.next();
  Findings findings;
  findings.description = "round_tokens " + c.to_string() + " " +
                         std::string(name_of(args.rounding.policy)) +
                         " tile=" + std::to_string(args.rounding.tile);
  const std::int64_t P = rounded_capacity(c.T, c.E, c.options.top_k, args.rounding);
  const Tensor tokens(DType::kInt32, {P}), experts(DType::kInt32, {P});
  const Tensor weights(DType::kFloat32, {P}), topk_ids(DType::kInt32, {c.T, c.options.top_k});
  const Tensor after(DType::kInt32, {c.E}), before(DType::kInt32, {c.E});
  const Tensor workspace(DType::kUInt8, {static_cast<std::int64_t>(round_tokens_workspace_bytes(
                                            context, c.T, c.E, c.options.top_k))});
  args.logits = c.logits.view();
  args.token_ids = tokens.view();
  args.expert_ids = experts.view();
  args.pair_weights = weights.view();
  args.topk_ids = topk_ids.view();
  args.rows_per_expert = after.view();
  args.rows_per_expert_before = before.view();
  args.workspace = workspace.view();
  round_tokens_forward(context, args);

  compare_top_k(findings, c, topk_ids);
  if (!findings.passed()) return findings;
  compare_counts(findings, "rows_per_expert_before", before, count_ids(topk_ids, c.E));
  compare_counts(findings, "rows_per_expert", after, count_ids(experts, c.E));
  for (std::int64_t e = 0; e < c.E; ++e) {
    const std::int32_t f = before.as<std::int32_t>()[e], rounded = after.as<std::int32_t>()[e];
    findings.require(
        rounded % args.rounding.tile == 0 && std::abs(rounded - f) < args.rounding.tile,
        "rows_per_expert: " + std::to_string(f) + " became " + std::to_string(rounded));
  }

  Tensor grad(DType::kFloat32, {P});
  grad.fill_random(random);
  const Tensor grad_logits(DType::kFloat32, {c.T, c.E});
  round_tokens_backward(context, {c.options, c.logits.view(), topk_ids.view(), tokens.view(),
                                  experts.view(), grad.view(), grad_logits.view()});
  Tensor expected(DType::kFloat32, {P});
  Tensor expected_grad(DType::kFloat32, {c.T, c.E});
  expected.fill(0.0f);
  for (std::int64_t t = 0; t < c.T; ++t) {
    const auto ids = ids_of(topk_ids, t);
    const auto logits = oracle::logits_row(c.logits, t);
    std::vector<std::size_t> pairs;
    for (std::size_t p = 0; p < tokens.count(); ++p) {
      if (tokens.as<std::int32_t>()[p] == t) pairs.push_back(p);
    }
    for (const std::size_t p : pairs) {
      expected.set(p, static_cast<float>(
                          oracle::weight(c.options, logits, ids, experts.as<std::int32_t>()[p])));
    }
    const auto loss = [&](const oracle::Row& row) {
      double sum = 0.0;
      for (const std::size_t p : pairs) {
        sum += grad.at(p) * oracle::weight(c.options, row, ids, experts.as<std::int32_t>()[p]);
      }
      return sum;
    };
    set_row(expected_grad, t, oracle::gradient(loss, logits));
  }
  findings.compare("pair_weights", weights, expected, kRouterTolerance, /*may_vanish=*/true);
  compare_gradient(findings, grad_logits, expected_grad);
  return findings;
}

Findings check_round_select(const Context& context, Random& random) {
  const std::int64_t T = random.integer(1, 64), E = random.integer(1, 16);
  const std::int64_t K = random.integer(1, std::min<std::int64_t>(E, 6));
  const bool many_ties = random.chance(0.5);
  RoundSelectArgs args;
  args.rounding.tile = random.integer(1, std::min<std::int64_t>(T, 16));
  args.rounding.policy = static_cast<RoundingPolicy>(random.integer(0, 5));
  args.rounding.seed = random.next();
  Findings findings;
  findings.description = "round_select T=" + std::to_string(T) + " E=" + std::to_string(E) +
                         " K=" + std::to_string(K) + " " +
                         std::string(name_of(args.rounding.policy)) +
                         " tile=" + std::to_string(args.rounding.tile) + (many_ties ? " ties" : "");
  Tensor scores(DType::kFloat32, {T, E});
  for (std::size_t i = 0; i < scores.count(); ++i) {
    scores.set(i, many_ties ? static_cast<float>(random.integer(0, 8)) / 8.0f
                            : static_cast<float>(random.uniform()));
  }
  const Tensor topk_ids(DType::kInt32, {T, K});
  std::vector<std::set<std::int64_t>> chosen(static_cast<std::size_t>(E));  // tokens per expert
  for (std::int64_t t = 0; t < T; ++t) {
    const auto ids = oracle::top_k(oracle::logits_row(scores, t), K);
    for (std::int64_t k = 0; k < K; ++k) {
      const std::int64_t e = ids[static_cast<std::size_t>(k)];
      topk_ids.as<std::int32_t>()[t * K + k] = static_cast<std::int32_t>(e);
      chosen[static_cast<std::size_t>(e)].insert(t);
    }
  }
  const std::int64_t P = rounded_capacity(T, E, K, args.rounding);
  const Tensor tokens(DType::kInt32, {P}), experts(DType::kInt32, {P}), after(DType::kInt32, {E});
  const Tensor workspace(
      DType::kUInt8, {static_cast<std::int64_t>(round_tokens_workspace_bytes(context, T, E, K))});
  args.scores = scores.view();
  args.topk_ids = topk_ids.view();
  args.token_ids = tokens.view();
  args.expert_ids = experts.view();
  args.rows_per_expert = after.view();
  args.workspace = workspace.view();
  round_select(context, args);

  // Rank all tokens of every expert: chosen ones first, then by score, then by token.
  std::vector<std::vector<std::int64_t>> ranking(static_cast<std::size_t>(E));
  std::vector<std::int64_t> rows;
  std::vector<bool> up_changes_less;
  for (std::size_t e = 0; e < ranking.size(); ++e) {
    const auto score = [&](std::int64_t t) {
      return static_cast<double>(scores.at(static_cast<std::size_t>(t * E) + e));
    };
    for (std::int64_t t = 0; t < T; ++t) ranking[e].push_back(t);
    std::stable_sort(ranking[e].begin(), ranking[e].end(), [&](std::int64_t a, std::int64_t b) {
      const bool a_chosen = chosen[e].contains(a), b_chosen = chosen[e].contains(b);
      return a_chosen != b_chosen ? a_chosen : score(a) > score(b);
    });
    const auto f = static_cast<std::int64_t>(chosen[e].size());
    const std::int64_t down = f / args.rounding.tile * args.rounding.tile;
    const std::int64_t up = std::min(T, down + args.rounding.tile);
    double lost = 0.0, won = 0.0;
    for (std::int64_t i = down; i < f; ++i) lost += score(ranking[e][static_cast<std::size_t>(i)]);
    for (std::int64_t i = f; i < up; ++i) won += score(ranking[e][static_cast<std::size_t>(i)]);
    rows.push_back(f);
    up_changes_less.push_back(won < lost);
  }
  auto expected =
      oracle::rounded_rows(args.rounding.policy, args.rounding.tile, T, rows, up_changes_less);
  if (args.rounding.policy == RoundingPolicy::kStochastic) {  // either neighbour is right
    for (std::size_t e = 0; e < expected.size(); ++e) {
      const std::int64_t down = rows[e] / args.rounding.tile * args.rounding.tile;
      const std::int64_t got = after.as<std::int32_t>()[e];
      const bool up = got == down + args.rounding.tile && down != rows[e] && got <= T;
      expected[e] = up ? got : down;
    }
  }
  compare_counts(findings, "rows_per_expert", after, expected);
  if (!findings.passed()) return findings;

  std::size_t p = 0;
  for (std::size_t e = 0; e < ranking.size(); ++e) {
    auto kept = ranking[e];
    kept.resize(static_cast<std::size_t>(expected[e]));
    std::sort(kept.begin(), kept.end());
    for (const std::int64_t t : kept) {
      if (tokens.as<std::int32_t>()[p] != t ||
          experts.as<std::int32_t>()[p] != static_cast<std::int64_t>(e)) {
        findings.add("pair " + std::to_string(p) + " differs");
        return findings;
      }
      ++p;
    }
  }
  for (; p < tokens.count(); ++p) {
    if (tokens.as<std::int32_t>()[p] != -1 || experts.as<std::int32_t>()[p] != -1) {
      findings.add("unused pair " + std::to_string(p) + " is not -1");
      return findings;
    }
  }
  return findings;
}

}  // namespace sonicmoe::cli
