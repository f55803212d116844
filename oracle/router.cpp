#include "oracle/router.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace sonicmoe::oracle {
namespace {

bool is_sigmoid(const RouterOptions& options) { return options.scoring == Scoring::kSigmoidTopK; }

// Indices by descending value, equal ones by ascending index.
template <class T>
Ids descending(const std::vector<T>& values) {
  Ids order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int64_t a, std::int64_t b) { return values[at(a)] > values[at(b)]; });
  return order;
}

// The groups with the largest float32 sum of their two best scores.
Ids best_groups(const RouterOptions& options, const std::vector<float>& scores) {
  const std::int64_t size = static_cast<std::int64_t>(scores.size()) / options.num_groups;
  std::vector<float> sums;
  for (std::int64_t g = 0; g < options.num_groups; ++g) {
    std::vector<float> members(scores.begin() + g * size, scores.begin() + (g + 1) * size);
    std::sort(members.rbegin(), members.rend());
    sums.push_back(size == 1 ? members[0] : members[0] + members[1]);
  }
  Ids best = descending(sums);
  best.resize(at(options.top_groups));
  return best;
}

// weight(e) = scale * raw[e] / z, and which experts' raw scores z adds up.
struct Normalized {
  Values raw;  // [E] score up to a factor that cancels, so that no exponential overflows
  double z = 1.0;
  std::vector<bool> in_z;  // [E]
};

Normalized normalize(const RouterOptions& options, const Values& logits, const Ids& ids) {
  Normalized result;
  const bool whole_softmax = !is_sigmoid(options) && !options.renormalizes();
  result.in_z.assign(logits.size(), whole_softmax);
  if (options.renormalizes()) {
    for (const std::int64_t id : ids) result.in_z[at(id)] = true;
  }
  double shift = -std::numeric_limits<double>::infinity();
  for (std::size_t e = 0; e < logits.size(); ++e) {
    if (result.in_z[e]) shift = std::max(shift, logits[e]);
  }
  double sum = 0.0;
  for (std::size_t e = 0; e < logits.size(); ++e) {
    result.raw.push_back(is_sigmoid(options) ? sigmoid(logits[e]) : std::exp(logits[e] - shift));
    if (result.in_z[e]) sum += result.raw[e];
  }
  if (whole_softmax || options.renormalizes()) result.z = sum + (is_sigmoid(options) ? 1e-20 : 0.0);
  return result;
}

// function(t, logits of t) of every token, one after the other.
template <class Result, class Function>
Result for_each_token(const Values& logits, std::int64_t num_experts, Function function) {
  Result all;
  for (std::int64_t t = 0; t * num_experts < static_cast<std::int64_t>(logits.size()); ++t) {
    const Result own = function(t, row_of(logits, num_experts, t));
    all.insert(all.end(), own.begin(), own.end());
  }
  return all;
}

}  // namespace

double sigmoid(double x) {
  return x >= 0 ? 1.0 / (1.0 + std::exp(-x)) : std::exp(x) / (1.0 + std::exp(x));
}

Values scores(Scoring scoring, const Values& logits) {
  Values result;
  if (scoring == Scoring::kSigmoidTopK) {
    for (const double logit : logits) result.push_back(sigmoid(logit));
    return result;
  }
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (const double logit : logits) sum += std::exp(logit - largest);
  for (const double logit : logits) result.push_back(std::exp(logit - largest) / sum);
  return result;
}

std::vector<float> ranking_scores(const RouterOptions& options, const Values& logits) {
  const Values exact = scores(options.scoring, logits);
  std::vector<float> result(exact.begin(), exact.end());
  if (!options.selection_bias.defined()) return result;
  const float* bias = options.selection_bias.as<float>();
  for (std::size_t e = 0; e < result.size(); ++e) result[e] += bias[e];
  return result;
}

Ids select(const RouterOptions& options, const Values& logits) {
  // A softmax increases with its logits, but its float32 values need not: ties would appear.
  Ids chosen = descending(logits);
  if (is_sigmoid(options)) {
    const std::vector<float> ranking = ranking_scores(options, logits);
    const Ids groups = best_groups(options, ranking);
    const std::int64_t size = static_cast<std::int64_t>(logits.size()) / options.num_groups;
    chosen.clear();
    for (const std::int64_t e : descending(ranking)) {
      if (std::find(groups.begin(), groups.end(), e / size) != groups.end()) chosen.push_back(e);
    }
  }
  chosen.resize(at(options.top_k));
  return chosen;
}

Values weights(const RouterOptions& options, const Values& logits, const Ids& ids) {
  const Normalized n = normalize(options, logits, ids);
  Values result;
  for (const double raw : n.raw) result.push_back(double{options.scale} * raw / n.z);
  return result;
}

// With w_e = weight(e) and l'_i = d ln raw_i / dl_i (softmax: 1, sigmoid: 1 - sigmoid(l_i)):
//   d w_e / dl_i = w_e l'_i ([e = i] - [i in Z] raw_i / Z),  so
//   dLogits_i    = l'_i (g_i w_i - [i in Z] raw_i / Z * sum_e g_e w_e).
Values weights_gradient(const RouterOptions& options, const Values& logits, const Ids& ids,
                        const Values& grad) {
  const Normalized n = normalize(options, logits, ids);
  Values terms, result;
  for (std::size_t e = 0; e < logits.size(); ++e) {  // no row, no term, however large the weight
    terms.push_back(grad[e] == 0.0 ? 0.0 : grad[e] * double{options.scale} * n.raw[e] / n.z);
  }
  const double sum = std::accumulate(terms.begin(), terms.end(), 0.0);
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const double slope = is_sigmoid(options) ? sigmoid(-logits[i]) : 1.0;
    result.push_back(slope * (terms[i] - (n.in_z[i] ? n.raw[i] / n.z * sum : 0.0)));
  }
  return result;
}

// --------------------------------------------------------------------------------- all tokens

Ids token_choice(const RouterOptions& options, const Values& logits, std::int64_t num_experts) {
  return for_each_token<Ids>(logits, num_experts,
                             [&](std::int64_t, const Values& own) { return select(options, own); });
}

std::vector<float> ranking_matrix(const RouterOptions& options, const Values& logits,
                                  std::int64_t num_experts) {
  return for_each_token<std::vector<float>>(
      logits, num_experts,
      [&](std::int64_t, const Values& own) { return ranking_scores(options, own); });
}

Values weight_matrix(const RouterOptions& options, const Values& logits, std::int64_t num_experts,
                     const Ids& topk_ids) {
  return for_each_token<Values>(logits, num_experts, [&](std::int64_t t, const Values& own) {
    return weights(options, own, row_of(topk_ids, options.top_k, t));
  });
}

Values weight_matrix_gradient(const RouterOptions& options, const Values& logits,
                              std::int64_t num_experts, const Ids& topk_ids, const Values& grad) {
  return for_each_token<Values>(logits, num_experts, [&](std::int64_t t, const Values& own) {
    return weights_gradient(options, own, row_of(topk_ids, options.top_k, t),
                            row_of(grad, num_experts, t));
  });
}

// ----------------------------------------------------------------------------- matrix products

Values router_logits(const ConstTensorView& x, const ConstTensorView& weight,
                     const ConstTensorView& bias) {
  const std::int64_t T = x.size(0), d = x.size(1), E = weight.size(0);
  Values x_data = to_double(x), w_data = to_double(weight), result = zeros(T * E);
  const Values b = bias.defined() ? to_double(bias) : zeros(E);
  const Matrix xm{&x_data, d}, wm{&w_data, d}, logits{&result, E};
  for (std::int64_t t = 0; t < T; ++t) {
    for (std::int64_t e = 0; e < E; ++e) {
      logits(t, e) = b[at(e)];
      for (std::int64_t k = 0; k < d; ++k) logits(t, e) += xm(t, k) * wm(e, k);
    }
  }
  return result;
}

Values router_grad_x(const Values& grad_logits, const ConstTensorView& weight) {
  const std::int64_t E = weight.size(0), d = weight.size(1);
  const std::int64_t T = static_cast<std::int64_t>(grad_logits.size()) / E;
  Values w_data = to_double(weight), result = zeros(T * d);
  const Matrix wm{&w_data, d}, grad_x{&result, d};
  for (std::int64_t t = 0; t < T; ++t) {
    for (std::int64_t e = 0; e < E; ++e) {
      const double g = grad_logits[at(t * E + e)];
      for (std::int64_t k = 0; k < d; ++k) grad_x(t, k) += g * wm(e, k);
    }
  }
  return result;
}

RouterGradients router_gradients(const Values& grad_logits, std::int64_t num_experts,
                                 const ConstTensorView& x) {
  const std::int64_t T = x.size(0), d = x.size(1), E = num_experts;
  Values x_data = to_double(x);
  RouterGradients result{zeros(E * d), zeros(E)};
  const Matrix xm{&x_data, d}, grad_weight{&result.weight, d};
  for (std::int64_t t = 0; t < T; ++t) {
    for (std::int64_t e = 0; e < E; ++e) {
      const double g = grad_logits[at(t * E + e)];
      result.bias[at(e)] += g;
      for (std::int64_t k = 0; k < d; ++k) grad_weight(e, k) += g * xm(t, k);
    }
  }
  return result;
}

}  // namespace sonicmoe::oracle
