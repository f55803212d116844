// Rows copied by warps.
#pragma once

#include "cuda/ptx/memory.cuh"

namespace sonicmoe::cuda {

inline constexpr int kExchangeThreads = 256;
inline constexpr int kExchangeWarps = kExchangeThreads / 32;

/// One warp copies `bytes` bytes, a multiple of 16, from and to multiples of 16. Its loads are in
/// flight together, 4 KB at a time: the source may be another GPU, microseconds away.
SONICMOE_DEVICE void copy_row(std::byte* to, const std::byte* from, std::int64_t bytes, int lane) {
  constexpr int kLoads = 8;
  constexpr std::int64_t kStep = 32 * 16;
  for (std::int64_t first = lane * 16; first < bytes; first += kLoads * kStep) {
    uint4 values[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const std::int64_t at = first + i * kStep;
      values[i] = ptx::load_global_v4(from + (at < bytes ? at : first));
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const std::int64_t at = first + i * kStep;
      if (at < bytes) ptx::store_global_v4(to + at, values[i]);
    }
  }
}

}  // namespace sonicmoe::cuda
