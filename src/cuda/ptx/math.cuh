// Approximate functions of the special-function unit and packed conversions.
#pragma once

#include "cuda/ptx/common.cuh"

namespace sonicmoe::ptx {

// 2^x, max relative error 2^-22; subnormal results are flushed.
SONICMOE_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1/x within 1 ulp.
SONICMOE_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to nearest even; `low` in bits 0-15.
SONICMOE_DEVICE uint32_t pack_bf16x2(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// The two halves of a bf16x2 as floats, exact.
SONICMOE_DEVICE float unpack_low(uint32_t packed) { return __uint_as_float(packed << 16); }
SONICMOE_DEVICE float unpack_high(uint32_t packed) { return __uint_as_float(packed & 0xffff0000u); }

}  // namespace sonicmoe::ptx
