// Stands in for CUDA's header of that name on the host: the types that epilogues use.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct int4 {
  int x, y, z, w;
};
struct float2 {
  float x, y;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(uint32_t{v.bits} << 16); }
