// What keeps experts evenly used: the losses and the bias update of section 4 of the algorithm
// page.
#pragma once

#include "oracle/values.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe::oracle {

/// What the Switch loss E sum_e f_e p_e reads: f_e = rows[e] / (T K), p_e the mean over the tokens
/// of softmax over E (sigmoid_topk: of sigmoid over its sum over E).
struct Balance {
  Scoring scoring;
  std::int64_t top_k;
  Ids rows;  ///< [E] of token choice
};

/// `logits` [T, E], here and below; T = 0 gives 0.
double load_balancing_loss(const Balance& balance, const Values& logits);
/// d loss / d logits [T, E].
Values load_balancing_loss_gradient(const Balance& balance, const Values& logits);

/// mean_t logsumexp(logits_t)^2.
double router_z_loss(const Values& logits, std::int64_t num_experts);
Values router_z_loss_gradient(const Values& logits, std::int64_t num_experts);

/// bias[e] + rate * sign(mean(rows) - rows[e]).
Values updated_expert_bias(Values bias, const Ids& rows, double rate);

}  // namespace sonicmoe::oracle
