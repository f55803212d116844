// The epilogue that stores the router's logits: float32 sums plus bias, by the math warps. The sums
// are not rounded, so the dump tile has no use for them.
#pragma once

#include "cuda/hopper/shape.hpp"

namespace sonicmoe::cuda::hopper {

template <int kBlockN>
struct StoreLogits {
  struct Params {
    float* logits;  // [T, E]
    int num_experts;
    const void* bias;  // [E] or null
    bool bias_is_bf16;
  };

  template <int kCount>
  static __device__ void finish(const Params& p, const Item& t, float (&acc)[kCount], int warp,
                                int lane) {
    // Rows start at multiples of 8 bytes.
    const bool pairs =
        p.num_experts % 2 == 0 && reinterpret_cast<std::uintptr_t>(p.logits) % 8 == 0;
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8;
      const int e = t.n * kBlockN + 2 * (lane % 4) + i / 4 * 8;
      if (row >= t.rows || e >= p.num_experts) continue;
      float* at = p.logits + int64_t{t.row0 + row} * p.num_experts + e;
      const float first = acc[i] + bias_of(p, e);
      if (pairs) {
        *reinterpret_cast<float2*>(at) = {first, acc[i + 1] + bias_of(p, e + 1)};
      } else {
        at[0] = first;
        if (e + 1 < p.num_experts) at[1] = acc[i + 1] + bias_of(p, e + 1);
      }
    }
  }

 private:
  static __device__ float bias_of(const Params& p, std::int64_t e) {
    if (p.bias == nullptr) return 0.0f;
    return p.bias_is_bf16 ? __bfloat162float(static_cast<const bf16*>(p.bias)[e])
                          : static_cast<const float*>(p.bias)[e];
  }
};

}  // namespace sonicmoe::cuda::hopper
