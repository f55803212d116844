// The exact sum of float32 values: integer arithmetic, so it depends neither on the order of the
// terms nor on the backend.
#pragma once

#include <cstdint>

#include "math/host_device.hpp"

namespace sonicmoe {

/// A fixed-point accumulator that spans all of float32: limb i holds multiples of 2^(32 i - 149).
/// Exact for up to 2^31 terms. An infinite term makes the magnitude infinite. An aggregate, so that
/// it can lie in shared memory: ExactSum sum{} is zero, or clear().
struct ExactSum {
  static constexpr int kLimbs = 10;  // 278 bits of float32 and 32 of carries

  std::int64_t limbs[kLimbs];
  int is_infinite;

  SONICMOE_HD void clear() {
    for (std::int64_t& limb : limbs) limb = 0;
    is_infinite = 0;
  }

  /// Adds `count` times `value`, 0 <= count < 2^31. On the GPU any number of threads may at once:
  /// integer sums do not depend on their order.
  SONICMOE_HD void add(float value, std::int64_t count = 1) {
    const std::uint32_t bits = bits_of(value);
    std::uint32_t exponent = (bits >> 23) & 0xffu;
    std::uint64_t mantissa = bits & 0x7fffffu;
    if (exponent == 0xffu) {
      if (count > 0) is_infinite = 1;
      return;
    }
    if (exponent == 0) {
      exponent = 1;  // subnormal
    } else {
      mantissa |= 0x800000u;
    }
    const std::uint32_t position = exponent - 1;  // value = +-mantissa * 2^(position - 149)
    const std::uint64_t shifted = mantissa << (position % 32);
    const std::int64_t times = (bits >> 31) != 0 ? -count : count;
    add_limb(position / 32, times * static_cast<std::int64_t>(shifted & 0xffffffffu));
    add_limb(position / 32 + 1, times * static_cast<std::int64_t>(shifted >> 32));
  }

  /// Whether |a| < |b|; two infinite magnitudes are equal. One thread; leaves both canonical.
  static SONICMOE_HD bool magnitude_is_less(ExactSum& a, ExactSum& b) {
    if (a.is_infinite != 0 || b.is_infinite != 0) return a.is_infinite < b.is_infinite;
    a.make_canonical();
    b.make_canonical();
    for (int i = kLimbs - 1; i >= 0; --i) {
      if (a.limbs[i] != b.limbs[i]) return a.limbs[i] < b.limbs[i];
    }
    return false;
  }

 private:
  SONICMOE_HD void add_limb(std::uint32_t i, std::int64_t value) {
#ifdef __CUDA_ARCH__
    atomicAdd(reinterpret_cast<unsigned long long*>(limbs + i),
              static_cast<unsigned long long>(value));  // modulo 2^64, as two's complement
#else
    limbs[i] += value;
#endif
  }
  // Takes the absolute value; limbs below the last are then in [0, 2^32).
  SONICMOE_HD void make_canonical() {
    propagate();
    if (limbs[kLimbs - 1] >= 0) return;
    for (std::int64_t& limb : limbs) limb = -limb;
    propagate();
  }
  SONICMOE_HD void propagate() {
    for (int i = 0; i + 1 < kLimbs; ++i) {
      limbs[i + 1] += limbs[i] >> 32;  // floor
      limbs[i] &= 0xffffffff;
    }
  }
};

}  // namespace sonicmoe
