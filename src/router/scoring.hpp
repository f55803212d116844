// Scores, selection and weights of one token: the part of the router that looks at one row of
// logits at a time. Exponentials and sums are in double, every stored value is rounded once.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "math/scoring.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe {

/// Tokens of one task: long enough to pay for the task, and one word of a 64-bit membership mask.
inline constexpr std::int64_t kTokenBlock = 64;

/// weight(t,e) of a logit of the token.
float weight_of(const RouterOptions& options, const TokenNormalizer& normalizer,
                float logit) noexcept;

/// Scores and selects for one token after the other. Holds O(E) scratch; one per task.
class TokenRouter {
 public:
  TokenRouter(const RouterOptions& options, std::int64_t num_experts);

  /// Takes the logits [E] of the next token. False when they cannot be scored: a NaN, or for a
  /// relative score a largest logit that is infinite; no other method may be called then.
  bool load(const float* logits);

  /// The top-K by descending selection score, ties to the lower expert. Biased scorings compare the
  /// float32 sum of score and bias among the experts of the best groups; the others compare logits,
  /// since scores increase with them.
  void select(std::int32_t* ids /* [K] */);

  /// For the token's own top-K.
  TokenNormalizer normalizer(const std::int32_t* ids /* [K] */);

  /// The float32 scores by which token rounding ranks tokens: a relative score's share of its sum
  /// over E, else score + bias.
  void ranking_scores(float* scores /* [E] */);

 private:
  void fill_raw();
  double raw_of(std::int32_t expert) const;
  void select_groups();

  const RouterOptions& options_;
  std::int64_t num_experts_;
  ScoreFunction score_;
  bool biased_;
  const float* logits_ = nullptr;      // [E]
  double shift_ = 0.0;                 // of a relative score
  std::vector<double> raw_;            // [E] where filled
  bool raw_filled_ = false;            // once needed
  std::vector<float> biased_scores_;   // [E] score + bias, of a biased scoring
  std::vector<std::uint64_t> keys_;    // [E] ranking keys of the candidates
  std::vector<std::uint64_t> groups_;  // [num_groups] ranking keys of the groups
};

/// The gradient of one token's weights. `gradient` [E] holds dL/d weight(t,e) on entry (0 where no
/// row uses it) and dL/d logit(t,e) on return; `ids` [K] is the token's own top-K.
void weight_backward(const RouterOptions& options, std::int64_t num_experts, const float* logits,
                     const std::int64_t* ids, double* gradient);

/// The lowest token at which something is wrong, whichever thread sees it first, so that messages
/// do not depend on the thread count.
class LowestToken {
 public:
  void report(std::int64_t token) noexcept {
    std::int64_t current = token_.load(std::memory_order_relaxed);
    while (token < current &&
           !token_.compare_exchange_weak(current, token, std::memory_order_relaxed)) {
    }
  }
  bool any() const noexcept { return value() != kNone; }
  std::int64_t value() const noexcept { return token_.load(std::memory_order_relaxed); }

 private:
  static constexpr std::int64_t kNone = std::numeric_limits<std::int64_t>::max();
  std::atomic<std::int64_t> token_{kNone};
};

/// Throws the Error for a token that TokenRouter::load refused. `logits` [T, E].
[[noreturn]] void fail_unscorable(const char* operation, const float* logits,
                                  std::int64_t num_experts, std::int64_t token);

/// Throws when the selection bias holds a NaN or +inf (-inf keeps an expert from being chosen).
void check_selection_bias(const char* operation, const RouterOptions& options,
                          std::int64_t num_experts);

}  // namespace sonicmoe
