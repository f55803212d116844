// The router's definition in float64, written independently of the library: what `check` compares
// the router operations with. Gradients come from central differences of the definition.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cli/tensor.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe::cli::oracle {

using Row = std::vector<double>;  // one token: [E]

/// Logits of token t.
Row logits_row(const Tensor& logits, std::int64_t token);
/// softmax over E, or sigmoid: the score that token rounding ranks by, without the bias.
Row scores(Scoring scoring, const Row& logits);
/// What top-K selects by: the scores with the selection bias, -infinity outside the best groups.
Row selection_scores(const RouterOptions& options, const Row& logits);
/// The K best, ties to the lower index.
std::vector<std::int64_t> top_k(const Row& selection, std::int64_t k);
/// weight(t, e) where the token's own top-K is `ids`.
double weight(const RouterOptions& options, const Row& logits, const std::vector<std::int64_t>& ids,
              std::int64_t expert);

/// d f / d logits of one token by central differences.
Row gradient(const std::function<double(const Row&)>& f, Row logits);

/// Counts after rounding. kStochastic is not determined by the definition; it returns `rows`.
std::vector<std::int64_t> rounded_rows(RoundingPolicy policy, std::int64_t tile,
                                       std::int64_t num_tokens,
                                       const std::vector<std::int64_t>& rows,
                                       const std::vector<bool>& up_changes_less);

}  // namespace sonicmoe::cli::oracle
