// RouterOptions for a kernel, and sums over a warp in a fixed order. Keys and scores of one value
// are the host's: math/order.hpp, math/scoring.hpp.
#pragma once

#include <cstdint>

#include "math/order.hpp"
#include "math/scoring.hpp"

namespace sonicmoe::cuda::router {

inline constexpr unsigned kAllLanes = 0xffffffffu;

/// Key of an expert that cannot be selected: no value has it (math/order.hpp).
inline constexpr std::uint32_t kExcluded = 0;

struct ScoringParams {
  const float* selection_bias;  // [E] or null
  int num_experts;
  int top_k;
  int num_groups;
  int top_groups;
  float scale;
  ScoreFunction score;
  bool biased;  // selects by score + bias, the best groups first; else by logit
  bool renormalizes;
};

inline ScoringParams scoring_params(const RouterOptions& options, std::int64_t num_experts) {
  ScoringParams p{};
  p.selection_bias = options.selection_bias.as<float>();
  p.num_experts = static_cast<int>(num_experts);
  p.top_k = static_cast<int>(options.top_k);
  p.num_groups = static_cast<int>(options.num_groups);
  p.top_groups = static_cast<int>(options.top_groups);
  p.scale = options.scale;
  p.score = score_function(options.scoring);
  p.biased = traits_of(options.scoring).biased;
  p.renormalizes = options.renormalizes();
  return p;
}

__device__ inline double raw_score(const ScoringParams& p, float logit, double shift) {
  return raw_score(p.score, logit, shift);
}

__device__ inline float weight_of(const ScoringParams& p, const TokenNormalizer& normalizer,
                                  float logit) {
  return weight_of_score(p.scale, normalizer, raw_score(p, logit, normalizer.shift));
}

// A butterfly: every lane ends with the same bits.
__device__ inline double warp_sum(double value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

/// The largest of all lanes; NaN only if every lane's is.
__device__ inline float warp_max(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

__device__ inline std::uint64_t warp_max(std::uint64_t value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const auto other = static_cast<std::uint64_t>(
        __shfl_xor_sync(kAllLanes, static_cast<unsigned long long>(value), distance));
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace sonicmoe::cuda::router
