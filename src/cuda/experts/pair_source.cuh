// What the kernels that build row lists read: the caller's routing, pair by pair.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace sonicmoe::cuda {

// Position of a pair in the caller's routing -> expert and token; expert -1 for a dropped pair.
struct PairSource {
  const void* expert_ids;
  const void* token_ids;  // null: top-K, token = position / K
  const void* weights;    // by pair, or null
  bool wide;              // int64 ids
  bool weights_are_bf16;
  int top_k;
  std::int64_t num_tokens;
  std::int64_t first_expert;  // id of expert 0
  int num_experts;

  __device__ static std::int64_t id_at(const void* ids, bool wide, std::int64_t i) {
    return wide ? static_cast<const std::int64_t*>(ids)[i]
                : std::int64_t{static_cast<const std::int32_t*>(ids)[i]};
  }
  __device__ std::int64_t token(std::int64_t pair) const {
    if (token_ids != nullptr) return id_at(token_ids, wide, pair);
    return static_cast<std::uint32_t>(pair) / static_cast<std::uint32_t>(top_k);  // P < 2^31
  }
  __device__ float weight(std::int64_t pair) const {
    return weights_are_bf16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(weights)[pair])
                            : static_cast<const float*>(weights)[pair];
  }
  __device__ bool has_token(std::int64_t pair) const {
    if (token_ids == nullptr) return true;
    const std::int64_t t = token(pair);
    return t >= 0 && t < num_tokens;
  }
  __device__ int expert(std::int64_t pair) const {
    const std::int64_t id = id_at(expert_ids, wide, pair), e = id - first_expert;
    return id >= first_expert && e < num_experts && has_token(pair) ? static_cast<int>(e) : -1;
  }
};

// What a pair list needs for the rows of its tokens.
struct TokenLists {
  std::int32_t* counts;   // [T + 1, whole int4] cleared; null for top-K routing, as are all
  std::int32_t* start;    // [T + 1] Metadata::token_start
  std::int32_t* arrived;  // [P] pairs by token, those of a token in any order
  std::int32_t* arrival;  // [P] how many of its token's pairs came before a pair
  std::int64_t num_tokens;
};

}  // namespace sonicmoe::cuda
