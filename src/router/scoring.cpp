#include "router/scoring.hpp"

#include <algorithm>
#include <cmath>
#include <functional>

#include "math/order.hpp"
#include "sonicmoe/error.hpp"

namespace sonicmoe {
namespace {

constexpr double kSigmoidEpsilon = 1e-20;  // DeepSeek-V3's; keeps 0 / 0 out of renormalisation

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

}  // namespace

double sigmoid(double x) noexcept { return 1.0 / (1.0 + std::exp(-x)); }

double sigmoid_slope(double x) noexcept {
  const double z = std::exp(-std::abs(x));
  return z / ((1.0 + z) * (1.0 + z));
}

float weight_of(const RouterOptions& options, const TokenNormalizer& normalizer,
                float logit) noexcept {
  const double raw = options.scoring == Scoring::kSigmoidTopK
                         ? sigmoid(logit)
                         : std::exp(double{logit} - normalizer.shift);
  return static_cast<float>(double{options.scale} * raw / normalizer.denominator);
}

// ------------------------------------------------------------------------------------ TokenRouter

TokenRouter::TokenRouter(const RouterOptions& options, std::int64_t num_experts)
    : options_(options),
      num_experts_(num_experts),
      is_softmax_(options.scoring != Scoring::kSigmoidTopK),
      raw_(index(num_experts)) {
  keys_.reserve(index(num_experts));
  if (!is_softmax_) biased_.resize(index(num_experts));
  if (!is_softmax_ && options.top_groups < options.num_groups) {
    groups_.resize(index(options.num_groups));
  }
}

bool TokenRouter::load(const float* logits) {
  logits_ = logits;
  raw_filled_ = false;
  float largest = -std::numeric_limits<float>::infinity();
  bool has_nan = false;
  for (std::int64_t e = 0; e < num_experts_; ++e) {
    has_nan |= std::isnan(logits[e]);
    largest = std::max(largest, logits[e]);
  }
  if (has_nan) return false;
  if (is_softmax_) {
    shift_ = largest;
    return std::isfinite(largest);
  }
  const float* bias = options_.selection_bias.as<float>();
  for (std::int64_t e = 0; e < num_experts_; ++e) {
    raw_[index(e)] = sigmoid(logits[e]);
    biased_[index(e)] = static_cast<float>(raw_[index(e)]) + (bias == nullptr ? 0.0f : bias[e]);
  }
  return true;
}

// Leaves the ranking keys of the selected groups in front of groups_.
void TokenRouter::select_groups() {
  const std::int64_t group_size = num_experts_ / options_.num_groups;
  for (std::int64_t g = 0; g < options_.num_groups; ++g) {
    const float* scores = biased_.data() + g * group_size;
    float first = scores[0];
    float second = -std::numeric_limits<float>::infinity();
    for (std::int64_t i = 1; i < group_size; ++i) {
      second = std::max(second, std::min(first, scores[i]));
      first = std::max(first, scores[i]);
    }
    groups_[index(g)] = ranking_key(group_size == 1 ? first : first + second, g);
  }
  std::nth_element(groups_.begin(), groups_.begin() + (options_.top_groups - 1), groups_.end(),
                   std::greater<>());
}

void TokenRouter::select(std::int32_t* ids) {
  const float* scores = is_softmax_ ? logits_ : biased_.data();
  keys_.clear();
  const auto add_candidates = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t e = begin; e < end; ++e) keys_.push_back(ranking_key(scores[e], e));
  };
  if (groups_.empty()) {
    add_candidates(0, num_experts_);
  } else {
    // Experts of other groups are no candidates at all, so none can win with a negative score.
    select_groups();
    const std::int64_t group_size = num_experts_ / options_.num_groups;
    for (std::int64_t i = 0; i < options_.top_groups; ++i) {
      const std::int64_t group = ranking_index(groups_[index(i)]);
      add_candidates(group * group_size, (group + 1) * group_size);
    }
  }
  std::partial_sort(keys_.begin(), keys_.begin() + options_.top_k, keys_.end(), std::greater<>());
  for (std::int64_t k = 0; k < options_.top_k; ++k) {
    ids[k] = static_cast<std::int32_t>(ranking_index(keys_[index(k)]));
  }
}

void TokenRouter::fill_exponentials() {
  if (raw_filled_) return;
  for (std::int64_t e = 0; e < num_experts_; ++e) {
    raw_[index(e)] = std::exp(double{logits_[e]} - shift_);
  }
  raw_filled_ = true;
}

TokenNormalizer TokenRouter::normalizer(const std::int32_t* ids) {
  double sum = 0.0;
  if (options_.renormalizes()) {
    for (std::int64_t k = 0; k < options_.top_k; ++k) {
      sum += is_softmax_ ? std::exp(double{logits_[ids[k]]} - shift_) : raw_[index(ids[k])];
    }
    return {shift_, is_softmax_ ? sum : sum + kSigmoidEpsilon};
  }
  if (!is_softmax_) return {shift_, 1.0};
  fill_exponentials();
  for (const double raw : raw_) sum += raw;
  return {shift_, sum};
}

void TokenRouter::ranking_scores(float* scores) {
  if (!is_softmax_) {
    std::copy(biased_.begin(), biased_.end(), scores);
    return;
  }
  fill_exponentials();
  double sum = 0.0;
  for (const double raw : raw_) sum += raw;
  for (std::int64_t e = 0; e < num_experts_; ++e) {
    scores[e] = static_cast<float>(raw_[index(e)] / sum);
  }
}

// --------------------------------------------------------------------------------------- backward

namespace {

// weight(e) = scale * exp(l_e) / sum over all E:  dl_i = scale * p_i * (g_i - sum_e g_e p_e).
void softmax_backward(const RouterOptions& options, std::int64_t num_experts, const float* logits,
                      double* gradient) {
  const double shift = *std::max_element(logits, logits + num_experts);
  double sum = 0.0;
  double dot = 0.0;
  for (std::int64_t e = 0; e < num_experts; ++e) {
    const double raw = std::exp(double{logits[e]} - shift);
    sum += raw;
    dot += gradient[e] * raw;
  }
  dot /= sum;
  for (std::int64_t e = 0; e < num_experts; ++e) {
    gradient[e] = options.scale * (std::exp(double{logits[e]} - shift) / sum) * (gradient[e] - dot);
  }
}

// weight(e) = scale * exp(l_e) / Z, Z = sum over the top-K of exp(l_k); e need not be in the top-K:
//   dl_i = scale * (g_i r_i - [i in top-K] r_i sum_e g_e r_e), r = exp(l) / Z.
void renormalized_softmax_backward(const RouterOptions& options, std::int64_t num_experts,
                                   const float* logits, const std::int64_t* ids, double* gradient) {
  double shift = -std::numeric_limits<double>::infinity();
  for (std::int64_t k = 0; k < options.top_k; ++k) shift = std::max(shift, double{logits[ids[k]]});
  double denominator = 0.0;
  for (std::int64_t k = 0; k < options.top_k; ++k) {
    denominator += std::exp(double{logits[ids[k]]} - shift);
  }
  const auto weight = [&](std::int64_t e) {
    return std::exp(double{logits[e]} - shift) / denominator;
  };
  double dot = 0.0;
  for (std::int64_t e = 0; e < num_experts; ++e) {
    if (gradient[e] == 0.0) continue;  // no row: saves the exponential
    gradient[e] *= weight(e);
    dot += gradient[e];
    gradient[e] *= options.scale;
  }
  for (std::int64_t k = 0; k < options.top_k; ++k) {
    gradient[ids[k]] -= options.scale * weight(ids[k]) * dot;
  }
}

// weight(e) = scale * s_e / Z, s = sigmoid(l), Z = 1 or the sum over the top-K + 1e-20:
//   ds_i = scale * (g_i / Z - [i in top-K] sum_e g_e s_e / Z^2),  dl_i = ds_i s_i (1 - s_i).
void sigmoid_backward(const RouterOptions& options, std::int64_t num_experts, const float* logits,
                      const std::int64_t* ids, double* gradient) {
  double denominator = 1.0;
  double dot = 0.0;
  if (options.renormalizes()) {
    denominator = kSigmoidEpsilon;
    for (std::int64_t k = 0; k < options.top_k; ++k) denominator += sigmoid(logits[ids[k]]);
    for (std::int64_t e = 0; e < num_experts; ++e) {
      if (gradient[e] != 0.0) dot += gradient[e] * (sigmoid(logits[e]) / denominator);
    }
  }
  for (std::int64_t e = 0; e < num_experts; ++e) {
    if (gradient[e] == 0.0) continue;
    gradient[e] *= options.scale * (sigmoid_slope(logits[e]) / denominator);
  }
  if (!options.renormalizes()) return;
  for (std::int64_t k = 0; k < options.top_k; ++k) {
    gradient[ids[k]] -= options.scale * (sigmoid_slope(logits[ids[k]]) / denominator) * dot;
  }
}

}  // namespace

void weight_backward(const RouterOptions& options, std::int64_t num_experts, const float* logits,
                     const std::int64_t* ids, double* gradient) {
  if (options.scoring == Scoring::kSigmoidTopK) {
    sigmoid_backward(options, num_experts, logits, ids, gradient);
  } else if (options.renormalizes()) {
    renormalized_softmax_backward(options, num_experts, logits, ids, gradient);
  } else {
    softmax_backward(options, num_experts, logits, gradient);
  }
}

// ----------------------------------------------------------------------------------------- errors

void fail_unscorable(const char* operation, const float* logits, std::int64_t num_experts,
                     std::int64_t token) {
  const float* row = logits + token * num_experts;
  const std::string at_token = " for token " + std::to_string(token);
  for (std::int64_t e = 0; e < num_experts; ++e) {
    if (std::isnan(row[e])) {
      throw Error(operation, "logits", "numbers",
                  "NaN" + at_token + ", expert " + std::to_string(e));
    }
  }
  const bool positive = *std::max_element(row, row + num_experts) > 0;
  throw Error(operation, "logits", "a finite largest logit of each token",
              (positive ? "inf" : "-inf") + at_token);
}

void check_selection_bias(const char* operation, const RouterOptions& options,
                          std::int64_t num_experts) {
  if (!options.selection_bias.defined()) return;
  const float* bias = options.selection_bias.as<float>();
  for (std::int64_t e = 0; e < num_experts; ++e) {
    if (std::isnan(bias[e]) || bias[e] == std::numeric_limits<float>::infinity()) {
      throw Error(operation, "selection_bias", "numbers below infinity",
                  (std::isnan(bias[e]) ? "NaN" : "inf") + (" for expert " + std::to_string(e)));
    }
  }
}

}  // namespace sonicmoe
