// Scores, selection and weights of one token: the part of the router that looks at one row of
// logits at a time. Exponentials and sums are in double, every stored value is rounded once.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "sonicmoe/router.hpp"

namespace sonicmoe {

/// Tokens of one task: long enough to pay for the task, and one word of a 64-bit membership mask.
inline constexpr std::int64_t kTokenBlock = 64;

double sigmoid(double x) noexcept;
/// d sigmoid / dx, without cancellation for large |x|.
double sigmoid_slope(double x) noexcept;

/// What turns a logit of one token into its weight: scale * raw / denominator, with
/// raw = exp(logit - shift) for the softmax scorings, sigmoid(logit) for sigmoid_topk.
struct TokenNormalizer {
  double shift;        ///< largest logit of the token, so that no exponential overflows
  double denominator;  ///< Z_t; the sum over all E for softmax_topk without renormalisation
};

float weight_of(const RouterOptions& options, const TokenNormalizer& normalizer,
                float logit) noexcept;

/// Scores and selects for one token after the other. Holds O(E) scratch; one per task.
class TokenRouter {
 public:
  TokenRouter(const RouterOptions& options, std::int64_t num_experts);

  /// Takes the logits [E] of the next token. False when they cannot be scored: a NaN, or for a
  /// softmax a largest logit that is infinite; no other method may be called then.
  bool load(const float* logits);

  /// The top-K by descending selection score, ties to the lower expert. The softmax scorings
  /// compare logits, since a softmax increases with them; sigmoid_topk compares the float32 sum of
  /// sigmoid and bias among the experts of the best groups.
  void select(std::int32_t* ids /* [K] */);

  /// For the token's own top-K.
  TokenNormalizer normalizer(const std::int32_t* ids /* [K] */);

  /// The float32 scores by which token rounding ranks tokens: softmax over E, or sigmoid + bias.
  void ranking_scores(float* scores /* [E] */);

 private:
  void fill_exponentials();
  void select_groups();

  const RouterOptions& options_;
  std::int64_t num_experts_;
  bool is_softmax_;
  const float* logits_ = nullptr;      // [E]
  double shift_ = 0.0;                 // softmax scorings
  std::vector<double> raw_;            // [E] sigmoid, or exp(logit - shift) once needed
  bool raw_filled_ = false;            // softmax scorings
  std::vector<float> biased_;          // [E] sigmoid + bias
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
