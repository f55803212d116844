// Router operations against the float64 definition of router_oracle.hpp.
#include <algorithm>
#include <cmath>
#include <functional>
#include <string>

#include "cli/check.hpp"
#include "cli/router_case.hpp"

namespace sonicmoe::cli {
namespace {

// topk_weights, and dLogits of sum grad * topk_weights.
struct ExpectedRoute {
  Tensor weights, grad_logits;

  ExpectedRoute(const RouterCase& c, const Tensor& ids, const Tensor& grad)
      : weights(DType::kFloat32, {c.T, c.options.top_k}), grad_logits(DType::kFloat32, {c.T, c.E}) {
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
        weights.set(first + k,
                    static_cast<float>(oracle::weight(c.options, logits, row_ids, row_ids[k])));
      }
      set_row(grad_logits, t, oracle::gradient(loss, logits));
    }
  }
};

constexpr double kGradLoss = 1.5;

// A loss that is the sum over the tokens of `share`, and its gradient times kGradLoss.
void compare_loss(Findings& findings, const RouterCase& c,
                  const std::function<double(const oracle::Row&)>& share, const Tensor& loss,
                  const Tensor& grad_logits) {
  double expected = 0.0;
  Tensor expected_grad(DType::kFloat32, {c.T, c.E});
  for (std::int64_t t = 0; t < c.T; ++t) {
    const auto logits = oracle::logits_row(c.logits, t);
    expected += share(logits);
    set_row(
        expected_grad, t,
        oracle::gradient([&](const oracle::Row& row) { return kGradLoss * share(row); }, logits));
  }
  findings.compare("loss", loss, constant(1, static_cast<float>(expected)), kRouterTolerance, true);
  compare_gradient(findings, grad_logits, expected_grad);
}

}  // namespace

Findings check_route(const Context& context, Random& random) {
  const RouterCase c(random, 0), placed = c.to(context.device);
  Findings findings;
  findings.description = "route " + c.to_string();
  const DType id_dtype = random.chance(0.5) ? DType::kInt32 : DType::kInt64;
  const Tensor ids(id_dtype, {c.T, c.options.top_k}, context.device);
  const Tensor weights(DType::kFloat32, {c.T, c.options.top_k}, context.device);
  const Tensor counts(DType::kInt32, {c.E}, context.device);
  route_forward(context,
                {placed.options, placed.logits.view(), ids.view(), weights.view(), counts.view()});
  compare_top_k(findings, c, ids);
  if (!findings.passed()) return findings;
  compare_counts(findings, "rows_per_expert", counts, count_ids(ids, c.E));

  Tensor grad(DType::kFloat32, {c.T, c.options.top_k});
  grad.fill_random(random);
  const Tensor placed_grad = grad.to(context.device);
  const Tensor grad_logits(DType::kFloat32, {c.T, c.E}, context.device);
  route_backward(context, {placed.options, placed.logits.view(), ids.view(), placed_grad.view(),
                           grad_logits.view()});
  const ExpectedRoute expected(c, ids.to_host(), grad);
  findings.compare("topk_weights", weights, expected.weights, kRouterTolerance,
                   /*may_vanish=*/c.T == 0);
  compare_gradient(findings, grad_logits, expected.grad_logits);
  return findings;
}

Findings check_load_balancing_loss(const Context& context, Random& random) {
  const RouterCase c(random, 1), placed = c.to(context.device);
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
  const Tensor placed_rows = rows.to(context.device);
  const Tensor loss(DType::kFloat32, {1}, context.device);
  load_balancing_loss_forward(context, c.options.scoring, c.options.top_k, placed.logits.view(),
                              placed_rows.view(), loss.view());
  const Tensor grad_loss = constant(1, kGradLoss).to(context.device);
  const Tensor grad_logits(DType::kFloat32, {c.T, c.E}, context.device);
  load_balancing_loss_backward(context, c.options.scoring, c.options.top_k, placed.logits.view(),
                               placed_rows.view(), grad_loss.view(), grad_logits.view());
  compare_loss(findings, c, share, loss, grad_logits);
  return findings;
}

Findings check_router_z_loss(const Context& context, Random& random) {
  const RouterCase c(random, 1), placed = c.to(context.device);
  Findings findings;
  findings.description = "router_z_loss " + c.to_string();
  const auto share = [&](const oracle::Row& logits) {
    const double highest = *std::max_element(logits.begin(), logits.end());
    double sum = 0.0;
    for (const double logit : logits) sum += std::exp(logit - highest);
    const double log_sum = highest + std::log(sum);
    return log_sum * log_sum / static_cast<double>(c.T);
  };
  const Tensor loss(DType::kFloat32, {1}, context.device);
  router_z_loss_forward(context, placed.logits.view(), loss.view());
  const Tensor grad_loss = constant(1, kGradLoss).to(context.device);
  const Tensor grad_logits(DType::kFloat32, {c.T, c.E}, context.device);
  router_z_loss_backward(context, placed.logits.view(), grad_loss.view(), grad_logits.view());
  compare_loss(findings, c, share, loss, grad_logits);
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
  const Tensor placed = bias.to(context.device), placed_rows = rows.to(context.device);
  update_expert_bias(context, placed.view(), placed_rows.view(), rate);
  const Tensor result = placed.to_host();
  for (std::size_t e = 0; e < result.count(); ++e) {
    findings.require(result.at(e) == expected.at(e), "bias: wrong at expert " + std::to_string(e));
  }
  return findings;
}

}  // namespace sonicmoe::cli
