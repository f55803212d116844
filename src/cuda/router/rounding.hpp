// Token rounding's workspace and the steps of its selection.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/router/scoring.cuh"

namespace sonicmoe::cuda::router {

/// The pieces of the workspace. Keys and chosen bits are kept transposed, a column of T per expert.
struct RoundingBuffers {
  TokenNormalizer* normalizers;   // [T] of the token's top-K
  std::uint32_t* keys;            // [E, 32 * words] ordered_key of the scores, 0 past T
  std::uint32_t* chosen;          // [E, words] bit t: token choice gave t to the expert
  std::int64_t* starts;           // [E + 1] first place of each expert in the pair list
  std::int32_t* rows_before;      // [E] f
  std::int32_t* rows_after;       // [E] f'
  std::uint8_t* up_changes_less;  // [E] of nearest_score
  std::int64_t num_tokens;
  int num_experts;
  int words;  // ceil(T / 32)
};

struct RoundingOutputs {
  std::int32_t* token_ids;   // [capacity]
  std::int32_t* expert_ids;  // [capacity]
  std::int64_t capacity;
  std::int32_t* rows_per_expert;         // [E] or null
  std::int32_t* rows_per_expert_before;  // [E] or null
};

/// What the pairs' weights come from, beside the buffers' normalizers.
struct PairWeights {
  ScoringParams scoring;
  const float* logits;  // [T, E]
  float* out;           // [capacity], or null: not asked for
};

/// From filled keys and chosen bits: rounds the counts, writes the pairs and fills the unused
/// places. Leaves the counts and starts in the buffers, and the rows in place of the chosen bits.
void launch_selection(cudaStream_t stream, const RoundingOptions& rounding,
                      const RoundingBuffers& buffers, const PairWeights& weights,
                      const RoundingOutputs& outputs, const char* operation);

}  // namespace sonicmoe::cuda::router
