// The exact sum of float32 values in shared memory: the arithmetic of math/exact_sum.hpp, so that
// `nearest_score` decides by the same integers as the host. Integer adds commute, so atomics keep
// the result independent of their order.
#pragma once

#include <cstdint>

namespace sonicmoe::cuda::router {

/// Limb i holds multiples of 2^(32 i - 149).
struct ExactSum {
  static constexpr int kLimbs = 10;

  std::int64_t limbs[kLimbs];
  int is_infinite;

  __device__ void clear() {
    for (std::int64_t& limb : limbs) limb = 0;
    is_infinite = 0;
  }

  /// Adds `count` times `value`, 0 <= count < 2^31. Any number of threads at once.
  __device__ void add(float value, std::int64_t count) {
    const std::uint32_t bits = __float_as_uint(value);
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
    const std::uint32_t position = exponent - 1;
    const std::uint64_t shifted = mantissa << (position % 32);
    const std::int64_t times = (bits >> 31) != 0 ? -count : count;
    add_limb(position / 32, times * static_cast<std::int64_t>(shifted & 0xffffffffu));
    add_limb(position / 32 + 1, times * static_cast<std::int64_t>(shifted >> 32));
  }

  /// Whether |a| < |b|; two infinite magnitudes are equal. One thread; leaves both canonical.
  __device__ static bool magnitude_is_less(ExactSum& a, ExactSum& b) {
    if (a.is_infinite != 0 || b.is_infinite != 0) return a.is_infinite < b.is_infinite;
    a.make_canonical();
    b.make_canonical();
    for (int i = kLimbs - 1; i >= 0; --i) {
      if (a.limbs[i] != b.limbs[i]) return a.limbs[i] < b.limbs[i];
    }
    return false;
  }

 private:
  __device__ void add_limb(std::uint32_t i, std::int64_t value) {
    atomicAdd(reinterpret_cast<unsigned long long*>(limbs + i),
              static_cast<unsigned long long>(value));  // modulo 2^64, as two's complement
  }
  // Takes the absolute value; limbs below the last are then in [0, 2^32).
  __device__ void make_canonical() {
    propagate();
    if (limbs[kLimbs - 1] >= 0) return;
    for (std::int64_t& limb : limbs) limb = -limb;
    propagate();
  }
  __device__ void propagate() {
    for (int i = 0; i + 1 < kLimbs; ++i) {
      limbs[i + 1] += limbs[i] >> 32;  // floor
      limbs[i] &= 0xffffffff;
    }
  }
};

}  // namespace sonicmoe::cuda::router
