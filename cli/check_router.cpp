// Router operations against the float64 definition of router_oracle.hpp.
#include <algorithm>
#include <cmath>
#include <string>

#include "cli/check.hpp"
#include "cli/router_case.hpp"

namespace sonicmoe::cli {

Findings check_route(const Context& context, Random& random) {
  const RouterCase c(random, 0);
  Findings findings;
  findings.description = "route " + c.to_string();
  const Tensor ids(random.chance(0.5) ? DType::kInt32 : DType::kInt64, {c.T, c.options.top_k});
  const Tensor weights(DType::kFloat32, {c.T, c.options.top_k});
  const Tensor counts(DType::kInt32, {c.E});
  route_forward(context, {c.options, c.logits.view(), ids.view(), weights.view(), counts.view()});
  compare_top_k(findings, c, ids);
  if (!findings.passed()) return findings;
  compare_counts(findings, "rows_per_expert", counts, count_ids(ids, c.E));

  Tensor grad(DType::kFloat32, {c.T, c.options.top_k});
  grad.fill_random(random);
  const Tensor grad_logits(DType::kFloat32, {c.T, c.E});
  route_backward(context,
                 {c.options, c.logits.view(), ids.view(), grad.view(), grad_logits.view()});

  Tensor expected(DType::kFloat32, {c.T, c.options.top_k});
  Tensor expected_grad(DType::kFloat32, {c.T, c.E});
  for (std::int64_t t = 0; t < c.T; ++t) {
    const auto row_ids = ids_of(ids, t);
    const auto first = static_cast<std::size_t>(t * c.options.top_k);
    const auto loss = [&](const oracle::Row& logits) {
      double sum = 0.0;
      for (std::size_t k = 0; k < row_ids.size(); ++k) {
        sum += grad.at(first + k) * oracle::weight(c.options, logits, row_ids, row_ids[k]);
      }
      return sum;
    };
    const auto logits = oracle::logits_row(c.logits, t);
    for (std::size_t k = 0; k < row_ids.size(); ++k) {
      expected.set(first + k,
                   static_cast<float>(oracle::weight(c.options, logits, row_ids, row_ids[k])));
    }
    set_row(expected_grad, t, oracle::gradient(loss, logits));
  }
  findings.compare("topk_weights", weights, expected, kRouterTolerance, /*may_vanish=*/c.T == 0);
  compare_gradient(findings, grad_logits, expected_grad);
  return findings;
}

Findings check_load_balancing_loss(const Context& context, Random& random) {
  const RouterCase c(random, 1);
  Findings findings;
  findings.description = "load_balancing_loss " + c.to_string();
  const Tensor rows(DType::kInt32, {c.E});
  for (std::int64_t e = 0; e < c.E; ++e) {
    rows.as<std::int32_t>()[e] = static_cast<std::int32_t>(random.integer(0, 3 * c.T));
  }
  // Share of token t: E * sum_e f_e * softmax(e) / T.
  const auto share = [&](const oracle::Row& logits) {
    oracle::Row p = oracle::scores(c.options.scoring, logits);
    double sum = 0.0;
    for (const double value : p) sum += value;
    double loss = 0.0;
    for (std::size_t e = 0; e < p.size(); ++e) loss += rows.as<std::int32_t>()[e] * p[e] / sum;
    return loss * static_cast<double>(c.E) / static_cast<double>(c.T * c.T * c.options.top_k);
  };
  const Tensor loss(DType::kFloat32, {1});
  load_balancing_loss_forward(context, c.options.scoring, c.options.top_k, c.logits.view(),
                              rows.view(), loss.view());
  const Tensor grad_loss = constant(1, 1.5f);
  const Tensor grad_logits(DType::kFloat32, {c.T, c.E});
  load_balancing_loss_backward(context, c.options.scoring, c.options.top_k, c.logits.view(),
                               rows.view(), grad_loss.view(), grad_logits.view());
  double expected = 0.0;
  Tensor expected_grad(DType::kFloat32, {c.T, c.E});
  for (std::int64_t t = 0; t < c.T; ++t) {
    const auto logits = oracle::logits_row(c.logits, t);
    expected += share(logits);
    set_row(expected_grad, t,
            oracle::gradient([&](const oracle::Row& row) { return 1.5 * share(row); }, logits));
  }
  findings.compare("loss", loss, constant(1, static_cast<float>(expected)), kRouterTolerance, true);
  compare_gradient(findings, grad_logits, expected_grad);
  return findings;
}

Findings check_router_z_loss(const Context& context, Random& random) {
  const RouterCase c(random, 1);
  Findings findings;
  findings.description = "router_z_loss " + c.to_string();
  const auto share = [&](const oracle::Row& logits) {
    const double highest = *std::max_element(logits.begin(), logits.end());
    double sum = 0.0;
    for (const double logit : logits) sum += std::exp(logit - highest);
    const double log_sum = highest + std::log(sum);
    return log_sum * log_sum / static_cast<double>(c.T);
  };
  const Tensor loss(DType::kFloat32, {1});
  router_z_loss_forward(context, c.logits.view(), loss.view());
  const Tensor grad_loss = constant(1, 1.5f);
  const Tensor grad_logits(DType::kFloat32, {c.T, c.E});
  router_z_loss_backward(context, c.logits.view(), grad_loss.view(), grad_logits.view());
  double expected = 0.0;
  Tensor expected_grad(DType::kFloat32, {c.T, c.E});
  for (std::int64_t t = 0; t < c.T; ++t) {
    const auto logits = oracle::logits_row(c.logits, t);
    expected += share(logits);
    set_row(expected_grad, t,
            oracle::gradient([&](const oracle::Row& row) { return 1.5 * share(row); }, logits));
  }
  findings.compare("loss", loss, constant(1, static_cast<float>(expected)), kRouterTolerance, true);
  compare_gradient(findings, grad_logits, expected_grad);
  return findings;
}

Findings check_update_expert_bias(const Context& context, Random& random) {
  const std::int64_t E = random.integer(1, 64);
  const float rate = 0.125f;
  Findings findings;
  findings.description = "update_expert_bias E=" + std::to_string(E);
  Tensor bias(DType::kFloat32, {E});
  const Tensor rows(DType::kInt32, {E});
  Tensor expected(DType::kFloat32, {E});
  std::int64_t total = 0;
  for (std::int64_t e = 0; e < E; ++e) {
    bias.set(static_cast<std::size_t>(e), static_cast<float>(random.integer(-16, 16)) / 4.0f);
    rows.as<std::int32_t>()[e] = static_cast<std::int32_t>(random.integer(0, 12));
    total += rows.as<std::int32_t>()[e];
  }
  for (std::int64_t e = 0; e < E; ++e) {
    const std::int64_t difference = total - E * rows.as<std::int32_t>()[e];  // E * (mean - rows)
    const float sign = difference > 0 ? 1.0f : difference < 0 ? -1.0f : 0.0f;
    expected.set(static_cast<std::size_t>(e), bias.at(static_cast<std::size_t>(e)) + rate * sign);
  }
  update_expert_bias(context, bias.view(), rows.view(), rate);
  for (std::size_t e = 0; e < bias.count(); ++e) {
    findings.require(bias.at(e) == expected.at(e), "bias: wrong at expert " + std::to_string(e));
  }
  return findings;
}

}  // namespace sonicmoe::cli
