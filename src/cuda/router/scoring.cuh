// Device counterparts of math/order.hpp and router/scoring.hpp: keys that order floats, raw
// scores, and sums over a warp in a fixed order.
#pragma once

#include <cstdint>

#include "math/order.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe::cuda::router {

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr double kSigmoidEpsilon = 1e-20;  // of router/scoring.cpp

/// Key of an expert that cannot be selected: no value has it (math/order.hpp).
inline constexpr std::uint32_t kExcluded = 0;

__device__ inline double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

/// d sigmoid / dx, without cancellation for large |x|.
__device__ inline double sigmoid_slope(double x) {
  const double z = exp(-fabs(x));
  return z / ((1.0 + z) * (1.0 + z));
}

/// RouterOptions for a kernel.
struct ScoringParams {
  const float* selection_bias;  // [E] or null
  int num_experts;
  int top_k;
  int num_groups;
  int top_groups;
  float scale;
  bool is_softmax;
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
  p.is_softmax = options.scoring != Scoring::kSigmoidTopK;
  p.renormalizes = options.renormalizes();
  return p;
}

/// weight(t,e) = scale * raw / denominator, raw = exp(logit - shift) or sigmoid(logit).
struct TokenNormalizer {
  double shift;
  double denominator;
};

__device__ inline double raw_score(const ScoringParams& p, float logit, double shift) {
  return p.is_softmax ? exp(double{logit} - shift) : sigmoid(logit);
}

__device__ inline float weight_of_score(const ScoringParams& p, const TokenNormalizer& normalizer,
                                        double raw) {
  return static_cast<float>(double{p.scale} * raw / normalizer.denominator);
}

__device__ inline float weight_of(const ScoringParams& p, const TokenNormalizer& normalizer,
                                  float logit) {
  return weight_of_score(p, normalizer, raw_score(p, logit, normalizer.shift));
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
