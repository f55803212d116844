// Scans over the threads of a CTA.
#pragma once

#include <cstdint>

namespace sonicmoe::cuda {

// Inclusive scan over the CTA's threads, whole warps, with an associative `combine`.
template <class Combine>
__device__ std::int32_t block_scan(std::int32_t value, Combine combine) {
  __shared__ std::int32_t warp_values[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int d = 1; d < 32; d *= 2) {
    const std::int32_t other = __shfl_up_sync(~0u, value, d);
    if (lane >= d) value = combine(other, value);
  }
  if (lane == 31) warp_values[warp] = value;
  __syncthreads();
  std::int32_t before = 0;
  for (int w = 0; w < warp; ++w) before = w == 0 ? warp_values[0] : combine(before, warp_values[w]);
  __syncthreads();
  return warp == 0 ? value : combine(before, value);
}

struct Sum {
  __device__ std::int32_t operator()(std::int32_t a, std::int32_t b) const { return a + b; }
};
struct Max {
  __device__ std::int32_t operator()(std::int32_t a, std::int32_t b) const { return max(a, b); }
};

}  // namespace sonicmoe::cuda
