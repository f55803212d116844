// Token rounding: section 5 of the algorithm page.
#pragma once

#include <span>
#include <vector>

#include "oracle/values.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe::oracle {

struct RoundedRows {
  Ids token_ids, expert_ids;                    ///< the kept pairs, by (expert, token)
  Ids rows_per_expert_before, rows_per_expert;  ///< [E] f and f'
};

/// Which pairs are kept, from the float32 scores [T, E] and the top-K ids [T, K] of token choice:
/// comparison and integer work only. Scores are added up (`nearest_score`) without rounding.
/// `targets` [E], where there are any, are f' itself.
RoundedRows round_rows(const RoundingOptions& rounding, const std::vector<float>& scores,
                       const Ids& topk_ids, std::int64_t num_tokens, const Ids& targets = {});

/// |sum added| < |sum dropped|, exactly. A sum with an infinite term is infinite in size, and two
/// infinite sums are equal.
bool changes_less(std::span<const float> added, std::span<const float> dropped);

/// Word 0 of Philox4x32-10 (Salmon et al., SC 2011) for counter (expert, 0, 0, 0), key = seed.
std::uint32_t rounding_bits(std::uint64_t seed, std::uint32_t expert);

}  // namespace sonicmoe::oracle
