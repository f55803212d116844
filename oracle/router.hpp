// The router of section 4 of the algorithm page, one token at a time, and its matrix products.
//
// **Who is chosen is decided among float32 numbers**, so that every backend can agree bit for bit.
// Three kinds are compared: logits (softmax scorings), sigmoid + bias (sigmoid_topk), and the score
// by which token rounding ranks. The oracle computes each in float64, rounds it to float32 once (a
// bias is added after that, in float32), and lets equal ones go to the lower index. A backend whose
// exp differs in the last place of float64 rounds to another float32 about once in 2^28 scores.
#pragma once

#include <vector>

#include "oracle/values.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe::oracle {

double sigmoid(double x);

/// score(t, e) of every expert [E]: softmax over E, or sigmoid.
Values scores(Scoring scoring, const Values& logits);

/// The scores [E] by which token rounding ranks tokens, with the selection bias.
std::vector<float> ranking_scores(const RouterOptions& options, const Values& logits);

/// The token's top-K, best first.
Ids select(const RouterOptions& options, const Values& logits);

/// weight(t, e) = scale * score(t, e) / Z_t of every expert [E], where `ids` is the token's own
/// top-K. In float64 throughout, so that finite differences can be taken.
Values weights(const RouterOptions& options, const Values& logits, const Ids& ids);

/// dLogits [E] of the loss sum_e grad[e] weight(t, e), the top-K `ids` held fixed.
Values weights_gradient(const RouterOptions& options, const Values& logits, const Ids& ids,
                        const Values& grad);

// The same of all tokens: logits, scores, weights and gradients are [T, E], ids [T, K].

Ids token_choice(const RouterOptions& options, const Values& logits, std::int64_t num_experts);
std::vector<float> ranking_matrix(const RouterOptions& options, const Values& logits,
                                  std::int64_t num_experts);
Values weight_matrix(const RouterOptions& options, const Values& logits, std::int64_t num_experts,
                     const Ids& topk_ids);
Values weight_matrix_gradient(const RouterOptions& options, const Values& logits,
                              std::int64_t num_experts, const Ids& topk_ids, const Values& grad);

// ------------------------------------------------------------------------------- matrix products

/// logits [T, E] = x weight^T + bias (absent: none).
Values router_logits(const ConstTensorView& x, const ConstTensorView& weight,
                     const ConstTensorView& bias);

/// The router's share of dX: grad_logits [T, E] times weight [E, d].
Values router_grad_x(const Values& grad_logits, const ConstTensorView& weight);

struct RouterGradients {
  Values weight;  ///< [E, d] = grad_logits^T x
  Values bias;    ///< [E], sums over the tokens
};
RouterGradients router_gradients(const Values& grad_logits, std::int64_t num_experts,
                                 const ConstTensorView& x);

}  // namespace sonicmoe::oracle
