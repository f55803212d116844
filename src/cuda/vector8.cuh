// Eight bf16 values of a row: what one lane of an epilogue warp reads, computes on and stores.
#pragma once

#include "cuda/ptx/math.cuh"

namespace sonicmoe::cuda {

SONICMOE_DEVICE uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

SONICMOE_DEVICE void unpack(const uint4& v, float (&out)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = ptx::unpack_low(word_of(v, i));
    out[2 * i + 1] = ptx::unpack_high(word_of(v, i));
  }
}

SONICMOE_DEVICE uint4 pack(const float (&v)[8]) {
  return {ptx::pack_bf16x2(v[0], v[1]), ptx::pack_bf16x2(v[2], v[3]), ptx::pack_bf16x2(v[4], v[5]),
          ptx::pack_bf16x2(v[6], v[7])};
}

// Eight pairs g0 u0 g1 u1 ..., four in either vector.
SONICMOE_DEVICE void unpack_pairs(const uint4& low, const uint4& high, float (&g)[8],
                                  float (&u)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t word = i < 4 ? word_of(low, i) : word_of(high, i - 4);
    g[i] = ptx::unpack_low(word);
    u[i] = ptx::unpack_high(word);
  }
}

SONICMOE_DEVICE void pack_pairs(const float (&g)[8], const float (&u)[8], uint4& low, uint4& high) {
  low = {ptx::pack_bf16x2(g[0], u[0]), ptx::pack_bf16x2(g[1], u[1]), ptx::pack_bf16x2(g[2], u[2]),
         ptx::pack_bf16x2(g[3], u[3])};
  high = {ptx::pack_bf16x2(g[4], u[4]), ptx::pack_bf16x2(g[5], u[5]), ptx::pack_bf16x2(g[6], u[6]),
          ptx::pack_bf16x2(g[7], u[7])};
}

}  // namespace sonicmoe::cuda
