// Losses that keep experts evenly used, and the bias update that does without a loss.
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "core/parallel.hpp"
#include "router/host_router.hpp"
#include "router/scoring.hpp"
#include "router/token_ids.hpp"

namespace sonicmoe {
namespace {

// Sums term(begin, end) over a fixed split of the tokens, in a fixed order: the split depends on T
// alone, so the sum does not depend on the thread count.
double sum_over_tokens(const Context& context, std::int64_t num_tokens,
                       const std::function<double(std::int64_t, std::int64_t)>& term) {
  constexpr std::int64_t kChunks = 64;
  std::array<double, kChunks> partial{};
  parallel_for(thread_count(context.num_threads), kChunks, [&](std::int64_t chunk, int) {
    const std::int64_t begin = num_tokens * chunk / kChunks;
    const std::int64_t end = num_tokens * (chunk + 1) / kChunks;
    if (begin < end) partial[static_cast<std::size_t>(chunk)] = term(begin, end);
  });
  return std::accumulate(partial.begin(), partial.end(), 0.0);
}

// One token's shares p(e) = raw(e) / sum of raw.
class TokenShares {
 public:
  TokenShares(Scoring scoring, std::int64_t num_experts)
      : of_scoring_(score_function(scoring)), raw_(static_cast<std::size_t>(num_experts)) {}

  void load(const float* logits) {
    const float largest =
        *std::max_element(logits, logits + static_cast<std::int64_t>(raw_.size()));
    score_ = share_score(of_scoring_, largest);
    sum_ = 0.0;
    for (std::size_t e = 0; e < raw_.size(); ++e) {
      raw_[e] = raw_score(score_, logits[e], largest);
      sum_ += raw_[e];
    }
  }
  /// sum_e rows[e] p(e).
  double mean_rows(const std::int32_t* rows) const {
    double dot = 0.0;
    for (std::size_t e = 0; e < raw_.size(); ++e) dot += rows[e] * raw_[e];
    return dot / sum_;
  }
  /// d p(j) / d logit(e) = slope(e) * ([j = e] - p(j)).
  double slope(std::size_t e, float logit) const {
    return score_slope(score_, logit, raw_[e]) / sum_;
  }

 private:
  ScoreFunction of_scoring_, score_{};
  std::vector<double> raw_;  // [E]
  double sum_ = 0.0;
};

double log_sum_exp(const float* logits, std::int64_t num_experts) {
  const double largest = *std::max_element(logits, logits + num_experts);
  double sum = 0.0;
  for (std::int64_t e = 0; e < num_experts; ++e) sum += std::exp(double{logits[e]} - largest);
  return largest + std::log(sum);
}

}  // namespace

void HostRouterBackend::load_balancing_loss_forward(const Context& context, Scoring scoring,
                                                    std::int64_t top_k, ConstTensorView logits,
                                                    ConstTensorView rows_per_expert,
                                                    TensorView loss) const {
  const std::int64_t num_tokens = logits.size(0);
  const std::int64_t num_experts = logits.size(1);
  const auto* rows = rows_per_expert.as<std::int32_t>();
  const double sum =
      sum_over_tokens(context, num_tokens, [&](std::int64_t begin, std::int64_t end) {
        TokenShares shares(scoring, num_experts);
        double partial = 0.0;
        for (std::int64_t t = begin; t < end; ++t) {
          shares.load(logits.as<float>() + t * num_experts);
          partial += shares.mean_rows(rows);
        }
        return partial;
      });
  *loss.as<float>() =
      num_tokens == 0 ? 0.0f
                      : static_cast<float>(balancing_scale(num_tokens, num_experts, top_k) * sum);
}

void HostRouterBackend::load_balancing_loss_backward(const Context& context, Scoring scoring,
                                                     std::int64_t top_k, ConstTensorView logits,
                                                     ConstTensorView rows_per_expert,
                                                     ConstTensorView grad_loss,
                                                     TensorView grad_logits) const {
  const std::int64_t num_tokens = logits.size(0);
  const std::int64_t num_experts = logits.size(1);
  if (num_tokens == 0) return;
  const auto* rows = rows_per_expert.as<std::int32_t>();
  const double scale = *grad_loss.as<float>() * balancing_scale(num_tokens, num_experts, top_k);
  parallel_for_tokens(context, num_tokens, [&](std::int64_t begin, std::int64_t end) {
    TokenShares shares(scoring, num_experts);
    for (std::int64_t t = begin; t < end; ++t) {
      const float* row = logits.as<float>() + t * num_experts;
      float* out = grad_logits.as<float>() + t * num_experts;
      shares.load(row);
      const double mean = shares.mean_rows(rows);
      for (std::int64_t e = 0; e < num_experts; ++e) {
        const double slope = shares.slope(static_cast<std::size_t>(e), row[e]);
        out[e] = static_cast<float>(scale * slope * (rows[e] - mean));
      }
    }
  });
}

void HostRouterBackend::router_z_loss_forward(const Context& context, ConstTensorView logits,
                                              TensorView loss) const {
  const std::int64_t num_tokens = logits.size(0);
  const std::int64_t num_experts = logits.size(1);
  const double sum =
      sum_over_tokens(context, num_tokens, [&](std::int64_t begin, std::int64_t end) {
        double partial = 0.0;
        for (std::int64_t t = begin; t < end; ++t) {
          const double value = log_sum_exp(logits.as<float>() + t * num_experts, num_experts);
          partial += value * value;
        }
        return partial;
      });
  *loss.as<float>() =
      num_tokens == 0 ? 0.0f : static_cast<float>(sum / static_cast<double>(num_tokens));
}

void HostRouterBackend::router_z_loss_backward(const Context& context, ConstTensorView logits,
                                               ConstTensorView grad_loss,
                                               TensorView grad_logits) const {
  const std::int64_t num_tokens = logits.size(0);
  const std::int64_t num_experts = logits.size(1);
  if (num_tokens == 0) return;
  const double scale = 2.0 * *grad_loss.as<float>() / static_cast<double>(num_tokens);
  parallel_for_tokens(context, num_tokens, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      const float* row = logits.as<float>() + t * num_experts;
      float* out = grad_logits.as<float>() + t * num_experts;
      const double value = log_sum_exp(row, num_experts);
      for (std::int64_t e = 0; e < num_experts; ++e) {
        out[e] = static_cast<float>(scale * value * std::exp(double{row[e]} - value));
      }
    }
  });
}

void HostRouterBackend::update_expert_bias(const Context&, TensorView bias,
                                           ConstTensorView rows_per_expert, float rate) const {
  const std::int64_t num_experts = bias.numel();
  const auto* rows = rows_per_expert.as<std::int32_t>();
  auto* values = bias.as<float>();
  const std::int64_t total = std::accumulate(rows, rows + num_experts, std::int64_t{0});
  for (std::int64_t e = 0; e < num_experts; ++e) {
    // sign(total / E - rows[e]) without the division.
    const std::int64_t difference = total - num_experts * rows[e];
    if (difference != 0) values[e] += difference > 0 ? rate : -rate;
  }
}

}  // namespace sonicmoe
