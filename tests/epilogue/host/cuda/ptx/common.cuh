// Stands in for the header of that name where epilogues run on the host (epilogue_test.cpp): what
// the compiler for the GPU defines by itself. A lane runs alone: a shuffle returns its own value, a
// sum over lanes is its own share.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#define __device__
#define __host__
#define __forceinline__ inline
#define SONICMOE_DEVICE inline

using std::max;
using std::min;

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(uint32_t{v.bits} << 16); }
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __shfl_sync(unsigned, T value, int) {
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned, T, int) {
  return T{};
}
inline void __syncwarp() {}
