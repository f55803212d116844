// Token choice as a kernel launch: top-K routing and the first step of token rounding.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/router/scoring.cuh"

namespace sonicmoe::cuda::router {

struct RouteParams {
  ScoringParams scoring;
  const float* logits;                     // [T, E]
  void* topk_ids;                          // [T, K] int32 or int64
  float* topk_weights = nullptr;           // [T, K] or null
  std::int32_t* rows = nullptr;            // [E] or null
  TokenNormalizer* normalizers = nullptr;  // [T] or null
  std::int64_t num_tokens;
  bool wide_ids;  // int64
};

/// T >= 1. `operation` names the caller in errors.
void launch_route(cudaStream_t stream, const RouteParams& params, const char* operation);

/// grad_logits [T, E]: overwritten with dL/d logits. With `grad_weights` [T, K], these are the
/// gradients of the token's top-K weights; without, grad_logits holds dL/d weight(t,e) on entry.
void launch_weight_backward(cudaStream_t stream, const ScoringParams& scoring, const float* logits,
                            ConstTensorView topk_ids, const float* grad_weights, float* grad_logits,
                            const char* operation);

}  // namespace sonicmoe::cuda::router
