#include "oracle/balancing.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "oracle/router.hpp"

namespace sonicmoe::oracle {
namespace {

double log_sum_exp(const Values& values) {
  const double largest = *std::max_element(values.begin(), values.end());
  double sum = 0.0;
  for (const double value : values) sum += std::exp(value - largest);
  return largest + std::log(sum);
}

// p(t, e) of one token [E]. Through logarithms, since every sigmoid of a token may underflow.
Values shares(Scoring scoring, const Values& logits) {
  Values log_scores = logits;
  if (scoring == Scoring::kSigmoidTopK) {
    for (double& x : log_scores) x = std::min(x, 0.0) - std::log1p(std::exp(-std::abs(x)));
  }
  return scores(Scoring::kSoftmaxTopK, log_scores);
}

std::int64_t tokens_of(const Values& logits, std::int64_t num_experts) {
  return static_cast<std::int64_t>(logits.size()) / num_experts;
}

// E f_e / T, the factor of sum_t p(t, e) in the loss.
Values factors(const Balance& balance, std::int64_t num_tokens) {
  const double T = static_cast<double>(num_tokens), K = static_cast<double>(balance.top_k);
  const double E = static_cast<double>(balance.rows.size());
  Values result;
  for (const std::int64_t rows : balance.rows) {
    result.push_back(E * (static_cast<double>(rows) / (T * K)) / T);
  }
  return result;
}

}  // namespace

double load_balancing_loss(const Balance& balance, const Values& logits) {
  const auto E = static_cast<std::int64_t>(balance.rows.size());
  const std::int64_t T = tokens_of(logits, E);
  const Values factor = factors(balance, T);
  double loss = 0.0;
  for (std::int64_t t = 0; t < T; ++t) {
    const Values p = shares(balance.scoring, row_of(logits, E, t));
    loss += std::inner_product(p.begin(), p.end(), factor.begin(), 0.0);
  }
  return loss;
}

// d p_e / dl_i = p_e l'_i ([e = i] - p_i), with l'_i = 1 (softmax) or 1 - sigmoid(l_i).
Values load_balancing_loss_gradient(const Balance& balance, const Values& logits) {
  const auto E = static_cast<std::int64_t>(balance.rows.size());
  const std::int64_t T = tokens_of(logits, E);
  const Values factor = factors(balance, T);
  Values result;
  for (std::int64_t t = 0; t < T; ++t) {
    const Values row = row_of(logits, E, t), p = shares(balance.scoring, row);
    const double mean = std::inner_product(p.begin(), p.end(), factor.begin(), 0.0);
    for (std::size_t i = 0; i < p.size(); ++i) {
      const double slope = balance.scoring == Scoring::kSigmoidTopK ? sigmoid(-row[i]) : 1.0;
      result.push_back(p[i] * slope * (factor[i] - mean));
    }
  }
  return result;
}

double router_z_loss(const Values& logits, std::int64_t num_experts) {
  const std::int64_t T = tokens_of(logits, num_experts);
  double sum = 0.0;
  for (std::int64_t t = 0; t < T; ++t) {
    const double z = log_sum_exp(row_of(logits, num_experts, t));
    sum += z * z;
  }
  return T == 0 ? 0.0 : sum / static_cast<double>(T);
}

Values router_z_loss_gradient(const Values& logits, std::int64_t num_experts) {
  const std::int64_t T = tokens_of(logits, num_experts);
  Values result;
  for (std::int64_t t = 0; t < T; ++t) {
    const Values row = row_of(logits, num_experts, t);
    const double z = log_sum_exp(row);
    for (const double logit : row) {
      result.push_back(2.0 * z * std::exp(logit - z) / static_cast<double>(T));
    }
  }
  return result;
}

Values updated_expert_bias(Values bias, const Ids& rows, double rate) {
  const std::int64_t total = std::accumulate(rows.begin(), rows.end(), std::int64_t{0});
  const auto E = static_cast<std::int64_t>(rows.size());
  for (std::size_t e = 0; e < rows.size(); ++e) {
    const std::int64_t below = total - E * rows[e];  // E (mean - rows[e])
    bias[e] += below > 0 ? rate : below < 0 ? -rate : 0.0;
  }
  return bias;
}

}  // namespace sonicmoe::oracle
