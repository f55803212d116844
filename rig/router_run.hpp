// The router's operations on a target and by the definition: the two sides of a comparison.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "rig/tensor.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe::rig {

struct RouterProblem {
  std::int64_t num_tokens = 0;
  std::int64_t num_experts = 1;
  RouterOptions options;  ///< the bias is set from below
  Values bias;            ///< [E] or empty
  Values logits;          ///< [T, E]

  std::string describe() const;
};

/// What an operation writes; what it does not write is empty.
struct RouterResult {
  // Bit for bit the same everywhere.
  Values topk_ids, token_ids, expert_ids, rows_per_expert, rows_per_expert_before;
  // In float32.
  Values weights;      ///< of the slots [T, K] or of the pairs [P]
  Values grad_logits;  ///< [T, E] of `grad_weights`, or of `grad_loss`
  Values loss;         ///< [1]
  std::vector<std::string> violations;
};

/// Two float32 roundings, relative to the largest element.
inline constexpr double kOneRounding = 1.5e-7;

/// What is wrong with `actual`: violations, ids and counts that differ, floats that are off by more
/// than `tolerance` times the largest expected. Where all of a gradient vanishes (a renormalised
/// single choice) it must be as small as rounding leaves it.
std::vector<std::string> differences(const RouterResult& actual, const RouterResult& expected,
                                     double tolerance = kOneRounding);

/// route_forward, and route_backward of `grad_weights` [T, K].
RouterResult run_route(const Target& target, const RouterProblem& problem,
                       const Values& grad_weights, DType id_dtype = DType::kInt32, int threads = 0);
RouterResult expected_route(const RouterProblem& problem, const Values& grad_weights);

/// round_tokens_forward and round_tokens_backward of `grad_weights` [P]. Those of unused places are
/// NaN on the target: nobody may read them.
RouterResult run_round_tokens(const Target& target, const RouterProblem& problem,
                              const RoundingOptions& rounding, const Values& grad_weights,
                              int threads = 0);
RouterResult expected_round_tokens(const RouterProblem& problem, const RoundingOptions& rounding,
                                   const Values& grad_weights);

/// What round_select reads.
struct Choice {
  std::int64_t num_tokens, num_experts, top_k;
  Values scores;  ///< [T, E] float32 values
  Values ids;     ///< [T, K]
};
/// `seed_tensor` replaces the seed.
RouterResult run_round_select(const Target& target, const Choice& choice,
                              const RoundingOptions& rounding, int threads = 0,
                              std::optional<std::int64_t> seed_tensor = {});
RouterResult expected_round_select(const Choice& choice, const RoundingOptions& rounding);

/// Of `problem` the logits, the scoring and K; `rows` [E].
RouterResult run_load_balancing_loss(const Target& target, const RouterProblem& problem,
                                     const Values& rows, double grad_loss, int threads = 0);
RouterResult expected_load_balancing_loss(const RouterProblem& problem, const Values& rows,
                                          double grad_loss);
RouterResult run_router_z_loss(const Target& target, const RouterProblem& problem, double grad_loss,
                               int threads = 0);
RouterResult expected_router_z_loss(const RouterProblem& problem, double grad_loss);

/// The bias after update_expert_bias.
Values run_update_expert_bias(const Target& target, const Values& bias, const Values& rows,
                              float rate);

}  // namespace sonicmoe::rig
