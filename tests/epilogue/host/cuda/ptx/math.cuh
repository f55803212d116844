// Stands in for the header of that name on the host.
#pragma once

#include "cuda/ptx/common.cuh"

namespace sonicmoe::ptx {

inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }

inline uint32_t round_to_bf16(float x) {  // to nearest even
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline uint32_t pack_bf16x2(float low, float high) {
  return round_to_bf16(low) | round_to_bf16(high) << 16;
}
inline float unpack_low(uint32_t packed) { return __uint_as_float(packed << 16); }
inline float unpack_high(uint32_t packed) { return __uint_as_float(packed & 0xffff0000u); }

}  // namespace sonicmoe::ptx
