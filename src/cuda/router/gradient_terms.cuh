// dlogits as bf16 terms (gradient_gemm.hpp), and the row lists of the products that take them.
#pragma once

#include <cuda_bf16.h>

#include "cuda/router/gradient_gemm.hpp"

namespace sonicmoe::cuda::router {

/// One term of four neighbouring experts.
struct alignas(8) FourTerms {
  static constexpr int kCount = 4;
  __nv_bfloat162 xy, zw;
};

__device__ inline FourTerms high_terms(float4 v) {
  return {__floats2bfloat162_rn(v.x, v.y), __floats2bfloat162_rn(v.z, v.w)};
}

/// What `high` leaves of v; the differences are exact.
__device__ inline FourTerms low_terms(float4 v, FourTerms high) {
  return {__floats2bfloat162_rn(v.x - __low2float(high.xy), v.y - __high2float(high.xy)),
          __floats2bfloat162_rn(v.z - __low2float(high.zw), v.w - __high2float(high.zw))};
}

/// Fills the lists that `terms` has; by the threads `first`, `first` + 1, ... of `threads`.
__device__ inline void write_lists(const GradientTerms& terms, std::int64_t num_tokens,
                                   std::int64_t first, std::int64_t threads) {
  const std::int64_t num_tiles = (num_tokens + kTileRows - 1) / kTileRows;
  if (terms.tiles != nullptr) {
    for (std::int64_t i = first; i < num_tiles; i += threads) {
      const std::int64_t row = i * kTileRows;
      terms.tiles[i] = {static_cast<int>(row),
                        static_cast<int>(min(std::int64_t{kTileRows}, num_tokens - row)), 0, 0};
    }
    if (first == 0) *terms.num_tiles = static_cast<int>(num_tiles);
  }
  if (first < RowLists::kCounters) terms.claims[first] = 0;
  for (std::int64_t i = first; i < terms.num_slices; i += threads) {
    const std::int64_t row = min(i * terms.rows_per_slice, num_tokens);
    terms.slices[i] = {static_cast<int>(row),
                       static_cast<int>(min(terms.rows_per_slice, num_tokens - row)),
                       static_cast<int>(i), 0};
  }
}

}  // namespace sonicmoe::cuda::router
