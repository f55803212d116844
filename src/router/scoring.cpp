#include "router/scoring.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "math/order.hpp"
#include "sonicmoe/error.hpp"

namespace sonicmoe {
namespace {

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

}  // namespace

float weight_of(const RouterOptions& options, const TokenNormalizer& normalizer,
                float logit) noexcept {
  const double raw = raw_score(score_function(options.scoring), logit, normalizer.shift);
  return weight_of_score(options.scale, normalizer, raw);
}

// ------------------------------------------------------------------------------------ TokenRouter

TokenRouter::TokenRouter(const RouterOptions& options, std::int64_t num_experts)
    : options_(options),
      num_experts_(num_experts),
      score_(score_function(options.scoring)),
      biased_(traits_of(options.scoring).biased),
      raw_(index(num_experts)) {
  keys_.reserve(index(num_experts));
  if (biased_) biased_scores_.resize(index(num_experts));
  if (options.top_groups < options.num_groups) groups_.resize(index(options.num_groups));
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
  if (is_relative(score_)) {
    shift_ = largest;
    if (!std::isfinite(largest)) return false;
  }
  if (biased_) {
    fill_raw();
    const float* bias = options_.selection_bias.as<float>();
    for (std::int64_t e = 0; e < num_experts_; ++e) {
      biased_scores_[index(e)] =
          static_cast<float>(raw_[index(e)]) + (bias == nullptr ? 0.0f : bias[e]);
    }
  }
  return true;
}

// Leaves the ranking keys of the selected groups in front of groups_.
void TokenRouter::select_groups() {
  const std::int64_t group_size = num_experts_ / options_.num_groups;
  for (std::int64_t g = 0; g < options_.num_groups; ++g) {
    const float* scores = biased_scores_.data() + g * group_size;
    float first = scores[0];
    float second = -std::numeric_limits<float>::infinity();
    for (std::int64_t i = 1; i < group_size; ++i) {
      second = std::max(second, std::min(first, scores[i]));
      first = std::max(first, scores[i]);
    }
    groups_[index(g)] = ranking_key(ordered_key(group_size == 1 ? first : first + second),
                                    static_cast<std::int32_t>(g));
  }
  std::nth_element(groups_.begin(), groups_.begin() + (options_.top_groups - 1), groups_.end(),
                   std::greater<>());
}

void TokenRouter::select(std::int32_t* ids) {
  const float* scores = biased_ ? biased_scores_.data() : logits_;
  keys_.clear();
  const auto add_candidates = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t e = begin; e < end; ++e) {
      keys_.push_back(ranking_key(ordered_key(scores[e]), static_cast<std::int32_t>(e)));
    }
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
    ids[k] = ranking_index(keys_[index(k)]);
  }
}

void TokenRouter::fill_raw() {
  if (raw_filled_) return;
  visit_score(score_, [&](auto score) {
    for (std::int64_t e = 0; e < num_experts_; ++e) {
      raw_[index(e)] = score.raw(logits_[e], shift_);
    }
  });
  raw_filled_ = true;
}

double TokenRouter::raw_of(std::int32_t expert) const {
  return raw_filled_ ? raw_[index(expert)] : raw_score(score_, logits_[expert], shift_);
}

TokenNormalizer TokenRouter::normalizer(const std::int32_t* ids) {
  double sum = 0.0;
  if (options_.renormalizes()) {
    for (std::int64_t k = 0; k < options_.top_k; ++k) sum += raw_of(ids[k]);
    return {shift_, sum + score_epsilon(score_)};
  }
  if (!is_relative(score_)) return {shift_, 1.0};
  fill_raw();
  for (const double raw : raw_) sum += raw;
  return {shift_, sum};
}

void TokenRouter::ranking_scores(float* scores) {
  if (biased_) {
    std::copy(biased_scores_.begin(), biased_scores_.end(), scores);
    return;
  }
  fill_raw();
  double sum = 1.0;
  if (is_relative(score_)) sum = std::accumulate(raw_.begin(), raw_.end(), 0.0);
  for (std::int64_t e = 0; e < num_experts_; ++e) {
    scores[e] = static_cast<float>(raw_[index(e)] / sum);
  }
}

// --------------------------------------------------------------------------------------- backward

namespace {

// weight(e) = scale * raw_e / Z, Z the sum over all E:
//   dl_i = scale * raw'_i / Z * (g_i - sum_e g_e raw_e / Z).
template <class Score>
void shares_backward(const RouterOptions& options, std::int64_t num_experts, const float* logits,
                     double* gradient) {
  const double shift = *std::max_element(logits, logits + num_experts);
  double sum = 0.0;
  double dot = 0.0;
  for (std::int64_t e = 0; e < num_experts; ++e) {
    const double raw = Score::raw(logits[e], shift);
    sum += raw;
    dot += gradient[e] * raw;
  }
  dot /= sum;
  for (std::int64_t e = 0; e < num_experts; ++e) {
    const double slope = Score::slope(logits[e], Score::raw(logits[e], shift));
    gradient[e] = options.scale * (slope / sum) * (gradient[e] - dot);
  }
}

// weight(e) = scale * raw_e / Z, Z the sum over the top-K + epsilon; e need not be in the top-K:
//   dl_i = scale * raw'_i / Z * (g_i - [i in top-K] sum_e g_e raw_e / Z).
template <class Score>
void renormalized_backward(const RouterOptions& options, std::int64_t num_experts,
                           const float* logits, const std::int64_t* ids, double* gradient) {
  double shift = 0.0;
  if (Score::kIsRelative) {
    shift = logits[ids[0]];
    for (std::int64_t k = 1; k < options.top_k; ++k)
      shift = std::max(shift, double{logits[ids[k]]});
  }
  double denominator = Score::kEpsilon;
  for (std::int64_t k = 0; k < options.top_k; ++k) {
    denominator += Score::raw(logits[ids[k]], shift);
  }
  const auto slope = [&](std::int64_t e, double raw) {
    return Score::slope(logits[e], raw) / denominator;
  };
  double dot = 0.0;
  for (std::int64_t e = 0; e < num_experts; ++e) {
    if (gradient[e] == 0.0) continue;  // no row: saves the exponential
    const double raw = Score::raw(logits[e], shift);
    dot += gradient[e] * (raw / denominator);
    // The same product in two orders: no bit of either scoring's gradients has ever changed.
    gradient[e] = Score::kIsRelative ? gradient[e] * slope(e, raw) * options.scale
                                     : gradient[e] * (options.scale * slope(e, raw));
  }
  for (std::int64_t k = 0; k < options.top_k; ++k) {
    const double raw = Score::raw(logits[ids[k]], shift);
    gradient[ids[k]] -= options.scale * slope(ids[k], raw) * dot;
  }
}

// weight(e) = scale * raw_e:  dl_i = scale * raw'_i * g_i.
template <class Score>
void plain_backward(const RouterOptions& options, std::int64_t num_experts, const float* logits,
                    double* gradient) {
  for (std::int64_t e = 0; e < num_experts; ++e) {
    if (gradient[e] == 0.0) continue;
    gradient[e] *= options.scale * Score::slope(logits[e], Score::raw(logits[e], 0.0));
  }
}

}  // namespace

void weight_backward(const RouterOptions& options, std::int64_t num_experts, const float* logits,
                     const std::int64_t* ids, double* gradient) {
  visit_score(score_function(options.scoring), [&]<class Score>(Score) {
    if (options.renormalizes()) {
      renormalized_backward<Score>(options, num_experts, logits, ids, gradient);
    } else if (Score::kIsRelative) {
      shares_backward<Score>(options, num_experts, logits, gradient);
    } else {
      plain_backward<Score>(options, num_experts, logits, gradient);
    }
  });
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
