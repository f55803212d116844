// Scores and weights of one logit, in float64: what the routers of the host and the GPU compute.
//   weight(t,e) = scale * raw(logit, shift) / denominator
// A Score below is a function raw(logit, shift) and what follows from it. Scorings share them.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "math/host_device.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe {

/// exp(logit - shift). Alone it says nothing: it is divided by its sum over the token's top-K or,
/// where weights are not renormalised, over all experts. The shift, which then cancels, is the
/// token's largest logit, so that nothing overflows.
struct Exponential {
  static constexpr bool kIsRelative = true;
  static constexpr double kEpsilon = 0.0;  ///< added to the sum over the top-K
  /// Below this logit raw is exp(logit) to the last bit.
  static constexpr float kIsExponentialBelow = std::numeric_limits<float>::infinity();
  static SONICMOE_HD double raw(double logit, double shift) { return exp(logit - shift); }
  /// d raw / d logit.
  static SONICMOE_HD double slope(double /*logit*/, double raw) { return raw; }
};

struct Sigmoid {
  static constexpr bool kIsRelative = false;
  static constexpr double kEpsilon = 1e-20;  ///< DeepSeek-V3's; keeps 0 / 0 out
  static constexpr float kIsExponentialBelow = -600.0f;
  static SONICMOE_HD double raw(double logit, double /*shift*/) {
    return 1.0 / (1.0 + exp(-logit));
  }
  static SONICMOE_HD double slope(double logit, double /*raw*/) {
    const double z = exp(-fabs(logit));  // no cancellation for large |logit|
    return z / ((1.0 + z) * (1.0 + z));
  }
};

enum class ScoreFunction : std::uint8_t { kExponential, kSigmoid };

/// Returns f(Exponential{}) or f(Sigmoid{}).
SONICMOE_HD_CALLS
template <class F>
SONICMOE_HD auto visit_score(ScoreFunction score, F&& f) {
  switch (score) {
    case ScoreFunction::kSigmoid:
      return f(Sigmoid{});
    case ScoreFunction::kExponential:
      break;
  }
  return f(Exponential{});
}

/// The score of a scoring whose enumerator was checked.
constexpr ScoreFunction score_function(Scoring scoring) {
  switch (scoring) {
    case Scoring::kTopKSoftmax:
    case Scoring::kSoftmaxTopK:
      return ScoreFunction::kExponential;
    case Scoring::kSigmoidTopK:
      return ScoreFunction::kSigmoid;
  }
  return ScoreFunction::kExponential;
}

static_assert(
    [] {
      for (const ScoringTraits& traits : kScorings) {
        if (traits.biased && score_function(traits.value) == ScoreFunction::kExponential) {
          return false;
        }
      }
      return true;
    }(),
    "a bias is added to scores, and a relative score is one only after the sum over all experts");

SONICMOE_HD double raw_score(ScoreFunction score, double logit, double shift) {
  return visit_score(score, [=](auto s) { return s.raw(logit, shift); });
}
/// d raw / d logit, given raw or the shift.
SONICMOE_HD double score_slope(ScoreFunction score, double logit, double raw) {
  return visit_score(score, [=](auto s) { return s.slope(logit, raw); });
}
SONICMOE_HD double shifted_slope(ScoreFunction score, double logit, double shift) {
  return visit_score(score, [=](auto s) { return s.slope(logit, s.raw(logit, shift)); });
}
SONICMOE_HD bool is_relative(ScoreFunction score) {
  return visit_score(score, [](auto s) { return s.kIsRelative; });
}
SONICMOE_HD double score_epsilon(ScoreFunction score) {
  return visit_score(score, [](auto s) { return s.kEpsilon; });
}

/// What turns the logits of one token into weights.
struct TokenNormalizer {
  double shift;        ///< largest logit of the token where the score is relative
  double denominator;  ///< Z_t; of a relative score without renormalisation, its sum over all E
};

SONICMOE_HD float weight_of_score(float scale, const TokenNormalizer& normalizer, double raw) {
  return static_cast<float>(double{scale} * raw / normalizer.denominator);
}

// ------------------------------------------------------------------------------ balancing losses

/// The score whose quotients raw(e) / sum of raw are a token's shares p(e), given its largest
/// logit. Where every raw would underflow it is exp to the last bit, and the softmax has those
/// quotients.
SONICMOE_HD ScoreFunction share_score(ScoreFunction score, float largest) {
  const bool underflows =
      visit_score(score, [=](auto s) { return largest < s.kIsExponentialBelow; });
  return underflows ? ScoreFunction::kExponential : score;
}

/// E * f_e * p_e = balancing_scale * rows_e * sum_t p(t,e): E / (T*K) from f, 1 / T from p.
inline double balancing_scale(std::int64_t num_tokens, std::int64_t num_experts,
                              std::int64_t top_k) {
  const auto tokens = static_cast<double>(num_tokens);
  return static_cast<double>(num_experts) / (tokens * static_cast<double>(top_k)) / tokens;
}

}  // namespace sonicmoe
