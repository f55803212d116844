// The built-in router: logits, scoring, top-K, token rounding, balancing losses.
//
// One formula for all scorings (docs/ops/router.md):
//   score(t,e)  = exp(logit) (topk_softmax), softmax over E (softmax_topk), sigmoid (sigmoid_topk)
//   weight(t,e) = scale * score(t,e) / Z_t, Z_t = sum of the token's top-K scores where
//   renormalised
//                 (always for topk_softmax; + 1e-20 for sigmoid_topk), else 1
// Logits, scores, weights and their gradients are float32.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "sonicmoe/context.hpp"
#include "sonicmoe/export.hpp"
#include "sonicmoe/tensor.hpp"

namespace sonicmoe {

/// The integers are stored in exported graphs: they never change, and a new scoring takes the next.
enum class Scoring : std::uint8_t {
  kTopKSoftmax = 0,  ///< top-K of logits, softmax over the K (gpt-oss, the paper)
  kSoftmaxTopK = 1,  ///< top-K of softmax over E (Qwen3, Mixtral, OLMoE)
  kSigmoidTopK = 2,  ///< top-K of sigmoid + bias, best groups first (DeepSeek-V3, GLM)
};

/// Whether weights are divided by their sum over the token's top-K.
enum class Renormalization : std::uint8_t {
  kOff,     ///< unless RouterOptions::renormalize asks for it
  kOn,      ///< unless it is turned off
  kAlways,  ///< turning it off is an error
};

/// What a caller needs to know of a scoring. Its arithmetic: src/math/scoring.hpp.
struct ScoringTraits {
  Scoring value;
  std::string_view name;
  Renormalization renormalization;
  /// Selects by score + selection_bias, the best groups first. Otherwise by logit, and a selection
  /// bias or more than one group is an error.
  bool biased;
};

/// All scorings, in the order of their integers.
inline constexpr ScoringTraits kScorings[] = {
    {Scoring::kTopKSoftmax, "topk_softmax", Renormalization::kAlways, false},
    {Scoring::kSoftmaxTopK, "softmax_topk", Renormalization::kOff, false},
    {Scoring::kSigmoidTopK, "sigmoid_topk", Renormalization::kOn, true},
};

/// The row of `scoring`; the first where there is none.
constexpr const ScoringTraits& traits_of(Scoring scoring) noexcept {
  for (const ScoringTraits& traits : kScorings) {
    if (traits.value == scoring) return traits;
  }
  return kScorings[0];
}

/// How token rounding moves an expert's row count to a multiple of M. The integers never change.
enum class RoundingPolicy : std::uint8_t {
  kNearest = 0,       ///< "nearest"        the closer multiple, ties to the even multiple
  kUp = 1,            ///< "up"
  kDown = 2,          ///< "down"
  kStochastic = 3,    ///< "stochastic"     up with probability (f - floor) / M
  kBalanced = 4,      ///< "balanced"       keeps |R' - R| <= M/2
  kNearestScore = 5,  ///< "nearest_score"  whichever changes the expert's summed score least, ties
                      ///<                  down
};

/// The enumerator's name; "?" of an integer that is none.
SONICMOE_API std::string_view name_of(Scoring scoring) noexcept;
SONICMOE_API std::string_view name_of(RoundingPolicy policy) noexcept;
/// The enumerator of a name. Throws Error listing the legal names.
SONICMOE_API Scoring scoring_from_name(std::string_view name);
SONICMOE_API RoundingPolicy rounding_policy_from_name(std::string_view name);
/// All enumerators, in the order of their integers.
SONICMOE_API std::span<const Scoring> all_scorings() noexcept;
SONICMOE_API std::span<const RoundingPolicy> all_rounding_policies() noexcept;

// ----------------------------------------------------------------------------------------- logits

/// Arguments of router_logits_forward.
struct RouterLogitsForwardArgs {
  ConstTensorView x;              ///< [T, d] float32|bfloat16, unit stride in d
  ConstTensorView router_weight;  ///< [E, d], dtype of x or float32, unit stride in d
  ConstTensorView router_bias;    ///< [E], dtype of router_weight or float32, optional
  TensorView logits;              ///< [T, E] float32 contiguous
  TensorView workspace;  ///< [router_logits_forward_workspace_bytes()] uint8, 64-byte aligned
};

/// Scratch of router_logits_forward and of router_logits_backward.
SONICMOE_API std::size_t router_logits_forward_workspace_bytes(const Context& context,
                                                               std::int64_t num_tokens,
                                                               std::int64_t num_experts,
                                                               std::int64_t hidden_size);
SONICMOE_API std::size_t router_logits_backward_workspace_bytes(const Context& context,
                                                                std::int64_t num_tokens,
                                                                std::int64_t num_experts,
                                                                std::int64_t hidden_size);

/// logits = x router_weight^T + router_bias, summed in float32: the bits of moe_layer_forward's.
/// Errors: shapes, dtypes and strides; on a GPU x of another dtype than bfloat16, or d no multiple
/// of 8.
SONICMOE_API void router_logits_forward(const Context& context,
                                        const RouterLogitsForwardArgs& args);

/// Arguments of router_logits_backward.
struct RouterLogitsBackwardArgs {
  ConstTensorView x;              ///< [T, d] from forward
  ConstTensorView router_weight;  ///< [E, d] from forward
  ConstTensorView grad_logits;    ///< [T, E] float32 contiguous
  TensorView grad_x;              ///< [T, d] dtype of x, unit stride in d, or absent
  TensorView grad_router_weight;  ///< [E, d], dtype of router_weight or float32, or absent
  TensorView grad_router_bias;    ///< [E], dtype of router_weight or float32, or absent
  TensorView workspace;  ///< [router_logits_backward_workspace_bytes()] uint8, 64-byte aligned
};

/// grad_x = grad_logits router_weight, grad_router_weight = grad_logits^T x, grad_router_bias =
/// the column sums of grad_logits; overwritten. Errors: as router_logits_forward.
SONICMOE_API void router_logits_backward(const Context& context,
                                         const RouterLogitsBackwardArgs& args);

// ------------------------------------------------------------------------------------------ top-K

/// How logits become experts and weights.
struct RouterOptions {
  std::int64_t top_k = 1;  ///< K, 1..E
  Scoring scoring = Scoring::kSoftmaxTopK;
  /// Unset takes the scoring's default (kScorings): on for sigmoid_topk, off for softmax_topk.
  /// topk_softmax always renormalises; false is an error.
  std::optional<bool> renormalize;
  /// [E] float32, added for selection only, or absent. Biased scorings only: sigmoid_topk.
  ConstTensorView selection_bias;
  /// Biased scorings: the E experts form `num_groups` equal groups; only the `top_groups` with the
  /// largest sum of their top 2 biased scores (top 1 when a group has one expert) can be selected.
  /// num_groups must divide E, top_groups <= num_groups, K <= top_groups * E / num_groups.
  std::int64_t num_groups = 1;
  std::int64_t top_groups = 1;
  float scale = 1.0f;

  bool renormalizes() const noexcept {
    const Renormalization chosen = traits_of(scoring).renormalization;
    return chosen == Renormalization::kAlways ||
           renormalize.value_or(chosen == Renormalization::kOn);
  }
};

/// Arguments of route_forward.
struct RouteForwardArgs {
  RouterOptions options;
  ConstTensorView logits;      ///< [T, E] float32 contiguous
  TensorView topk_ids;         ///< [T, K] int32|int64 contiguous; by descending selection score
  TensorView topk_weights;     ///< [T, K] float32 contiguous
  TensorView rows_per_expert;  ///< [E] int32, optional
};

/// Top-K routing. Ties go to the lower expert index.
/// Errors: shapes and dtypes; the rules of RouterOptions; on the CPU a NaN logit (names the token).
SONICMOE_API void route_forward(const Context& context, const RouteForwardArgs& args);

/// Arguments of route_backward.
struct RouteBackwardArgs {
  RouterOptions options;
  ConstTensorView logits;             ///< [T, E] float32
  ConstTensorView topk_ids;           ///< [T, K] from forward
  ConstTensorView grad_topk_weights;  ///< [T, K] float32
  TensorView grad_logits;             ///< [T, E] float32, overwritten
};

/// dLogits from d(topk_weights); the selection itself has no gradient.
SONICMOE_API void route_backward(const Context& context, const RouteBackwardArgs& args);

// --------------------------------------------------------------------------------- token rounding

/// How an expert's row count moves to a multiple of M.
struct RoundingOptions {
  std::int64_t tile = 128;  ///< M >= 1
  RoundingPolicy policy = RoundingPolicy::kNearest;
  std::uint64_t seed = 0;  ///< of kStochastic: Philox4x32-10 keyed by (seed, expert)
  /// [1] int64 on the context's device; when present it replaces `seed` (may change between replays
  /// of a captured graph).
  ConstTensorView seed_tensor;
};

/// Length P of the returned pair list, a function of shapes only:
/// down T*K; balanced T*K + M/2; nearest T*K + E*(M/2); up, stochastic, nearest_score T*K +
/// E*(M-1).
SONICMOE_API std::int64_t rounded_capacity(std::int64_t num_tokens, std::int64_t num_experts,
                                           std::int64_t top_k, const RoundingOptions& rounding);

/// Arguments of round_tokens_forward.
struct RoundTokensForwardArgs {
  RouterOptions options;
  RoundingOptions rounding;
  ConstTensorView logits;  ///< [T, E] float32 contiguous
  /// [E] int32, or absent: the row counts themselves, in 0..T and at most P in sum, in place of
  /// those of the policy, of which then P alone depends. Not on a GPU.
  ConstTensorView targets;
  TensorView token_ids;   ///< [P] int32; sorted by (expert, token); unused places at the end are -1
  TensorView expert_ids;  ///< [P] int32; unused places -1
  TensorView pair_weights;     ///< [P] float32; unused places 0
  TensorView topk_ids;         ///< [T, K] int32: token choice before rounding (backward needs it)
  TensorView rows_per_expert;  ///< [E] int32 after rounding, optional
  TensorView rows_per_expert_before;  ///< [E] int32 of token choice, optional
  TensorView workspace;               ///< [round_tokens_workspace_bytes()] uint8, 64-byte aligned
};

/// Scratch of round_tokens_forward.
SONICMOE_API std::size_t round_tokens_workspace_bytes(const Context& context,
                                                      std::int64_t num_tokens,
                                                      std::int64_t num_experts, std::int64_t top_k);

/// Token rounding: moves every expert's row count to a multiple of M, less than one tile away from
/// token choice. Rows kept keep their weight; added rows continue the same scale
/// (docs/ops/round_tokens.md). Errors: as route_forward; T < M; P other than rounded_capacity().
SONICMOE_API void round_tokens_forward(const Context& context, const RoundTokensForwardArgs& args);

/// The selection inside round_tokens_forward alone: comparison and integer work on given scores, so
/// every backend returns the same bits. `scores` [T, E] float32 (with the selection bias),
/// `topk_ids` [T, K] int32. Same outputs and errors as round_tokens_forward, without weights.
struct RoundSelectArgs {
  RoundingOptions rounding;
  ConstTensorView scores;
  ConstTensorView topk_ids;
  ConstTensorView targets;  ///< [E] int32, or absent: as of RoundTokensForwardArgs
  TensorView token_ids;
  TensorView expert_ids;
  TensorView rows_per_expert;         ///< optional
  TensorView rows_per_expert_before;  ///< optional
  TensorView workspace;               ///< [round_tokens_workspace_bytes()]
};
SONICMOE_API void round_select(const Context& context, const RoundSelectArgs& args);

/// Arguments of round_tokens_backward.
struct RoundTokensBackwardArgs {
  RouterOptions options;
  ConstTensorView logits;             ///< [T, E] float32
  ConstTensorView topk_ids;           ///< [T, K] int32 from forward
  ConstTensorView token_ids;          ///< [P] int32 from forward
  ConstTensorView expert_ids;         ///< [P] int32 from forward
  ConstTensorView grad_pair_weights;  ///< [P] float32
  TensorView grad_logits;             ///< [T, E] float32, overwritten
};

/// dLogits through weight(t,e) with Z_t of the token's own top-K, dropped slots included.
SONICMOE_API void round_tokens_backward(const Context& context,
                                        const RoundTokensBackwardArgs& args);

// -------------------------------------------------------------------------------------- balancing

/// Switch auxiliary loss E * sum_e f_e p_e: f_e = rows_per_expert[e] / (T*K), p_e the mean over the
/// tokens of softmax over E (sigmoid_topk: of sigmoid over its sum over E). Uniform routing
/// gives 1. (Hugging Face's value is K times this.) `loss` [1] float32. T = 0 gives 0.
/// rows_per_expert counts token choice: after rounding, counts hide what the router chose.
SONICMOE_API void load_balancing_loss_forward(const Context& context, Scoring scoring,
                                              std::int64_t top_k, ConstTensorView logits,
                                              ConstTensorView rows_per_expert, TensorView loss);
/// grad_logits [T, E] float32 = grad_loss[0] * d loss / d logits, overwritten.
SONICMOE_API void load_balancing_loss_backward(const Context& context, Scoring scoring,
                                               std::int64_t top_k, ConstTensorView logits,
                                               ConstTensorView rows_per_expert,
                                               ConstTensorView grad_loss, TensorView grad_logits);

/// Router z-loss: mean over the tokens of logsumexp(logits_t)^2. `loss` [1] float32; T = 0 gives 0.
SONICMOE_API void router_z_loss_forward(const Context& context, ConstTensorView logits,
                                        TensorView loss);
SONICMOE_API void router_z_loss_backward(const Context& context, ConstTensorView logits,
                                         ConstTensorView grad_loss, TensorView grad_logits);

/// Auxiliary-loss-free balancing: selection_bias[e] += rate * sign(mean(rows) - rows[e]), in place.
/// `selection_bias` [E] float32, `rows_per_expert` [E] int32.
SONICMOE_API void update_expert_bias(const Context& context, TensorView selection_bias,
                                     ConstTensorView rows_per_expert, float rate);

}  // namespace sonicmoe
