// The selection of token rounding: which (token, expert) pairs remain, given scores and top-K ids.
// Comparison and integer work only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "router/scoring.hpp"
#include "sonicmoe/context.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe {

/// The pieces of the workspace. Scores are kept transposed, one column of T keys per expert.
struct RoundingBuffers {
  TokenNormalizer* normalizers;   ///< [T]
  std::uint32_t* keys;            ///< [E, T] ordered_key of the scores
  std::uint64_t* chosen;          ///< [E, ceil(T/64)] bit t: token choice gave t to the expert
  std::int64_t* starts;           ///< [E + 1] first place of each expert in the pair list
  std::int32_t* rows_before;      ///< [E] f
  std::int32_t* rows_after;       ///< [E] f'
  std::uint8_t* up_changes_less;  ///< [E] of kNearestScore
  std::int64_t num_tokens;
  std::int64_t num_experts;

  std::int64_t words() const noexcept { return (num_tokens + 63) / 64; }
};

/// Lays the pieces out from `base` (null: only counts) and returns the bytes needed.
std::size_t carve_rounding_buffers(void* base, std::int64_t num_tokens, std::int64_t num_experts,
                                   RoundingBuffers& buffers);

/// Collects one block of kTokenBlock tokens and stores it as columns of the buffers.
class ColumnBlock {
 public:
  /// Block `begin` / kTokenBlock of the tokens.
  ColumnBlock(const RoundingBuffers& buffers, std::int64_t begin, std::int64_t end);

  /// Every token of the block once. False when an id is outside 0..E-1 or occurs twice.
  bool set(std::int64_t token, const float* scores /* [E] */, const std::int32_t* ids /* [K] */,
           std::int64_t top_k);
  void store() const;

 private:
  RoundingBuffers buffers_;
  std::int64_t begin_;
  std::int64_t end_;
  std::vector<std::uint32_t> keys_;    // [kTokenBlock, E]
  std::vector<std::uint64_t> chosen_;  // [E]
};

struct RoundingOutputs {
  std::int32_t* token_ids;   ///< [capacity]
  std::int32_t* expert_ids;  ///< [capacity]
  std::int64_t capacity;
  TensorView rows_per_expert;         ///< [E] int32, optional
  TensorView rows_per_expert_before;  ///< [E] int32, optional
};

/// Throws in the operation's name unless each of the targets is in 0..T and their sum fits.
void check_targets(const char* operation, const ConstTensorView& targets, std::int64_t num_tokens,
                   std::int64_t capacity);

/// Rounds the row counts, or takes the targets where there are any, and writes the pairs, from
/// filled keys and chosen bits. Leaves the buffers' starts for whoever writes the weights.
void select_rounded_rows(const Context& context, const RoundingOptions& rounding,
                         const ConstTensorView& targets, const RoundingBuffers& buffers,
                         const RoundingOutputs& outputs);

}  // namespace sonicmoe
