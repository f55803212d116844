// The exact sum of float32 values: integer arithmetic, so it depends neither on the order of the
// terms nor on the backend.
#pragma once

#include <array>
#include <bit>
#include <compare>
#include <cstddef>
#include <cstdint>

namespace sonicmoe {

/// A fixed-point accumulator that spans all of float32: limb i holds multiples of 2^(32 i - 149).
/// Exact for up to 2^31 terms. An infinite term makes the magnitude infinite.
class ExactSum {
 public:
  void add(float value) noexcept {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    std::uint32_t exponent = (bits >> 23) & 0xffu;
    std::uint64_t mantissa = bits & 0x7fffffu;
    if (exponent == 0xffu) {
      infinite_ = true;
      return;
    }
    if (exponent == 0) {
      exponent = 1;  // subnormal
    } else {
      mantissa |= 0x800000u;
    }
    const std::uint32_t position = exponent - 1;  // value = +-mantissa * 2^(position - 149)
    const std::uint64_t shifted = mantissa << (position % 32);
    const std::int64_t sign = (bits >> 31) != 0 ? -1 : 1;
    limbs_[position / 32] += sign * static_cast<std::int64_t>(shifted & 0xffffffffu);
    limbs_[position / 32 + 1] += sign * static_cast<std::int64_t>(shifted >> 32);
  }

  /// Order of |a| and |b|. Two infinite magnitudes are equal.
  static std::strong_ordering compare_magnitude(ExactSum a, ExactSum b) noexcept {
    if (a.infinite_ || b.infinite_) return a.infinite_ <=> b.infinite_;
    a.make_canonical();
    b.make_canonical();
    for (std::size_t i = kLimbs; i-- > 0;) {
      if (a.limbs_[i] != b.limbs_[i]) return a.limbs_[i] <=> b.limbs_[i];
    }
    return std::strong_ordering::equal;
  }

 private:
  static constexpr std::size_t kLimbs = 10;  // 278 bits of float32 and 32 of carries

  // Takes the absolute value; limbs below the last are then in [0, 2^32).
  void make_canonical() noexcept {
    propagate();
    if (limbs_[kLimbs - 1] >= 0) return;
    for (std::int64_t& limb : limbs_) limb = -limb;
    propagate();
  }
  void propagate() noexcept {
    for (std::size_t i = 0; i + 1 < kLimbs; ++i) {
      limbs_[i + 1] += limbs_[i] >> 32;  // floor
      limbs_[i] &= 0xffffffff;
    }
  }

  std::array<std::int64_t, kLimbs> limbs_{};
  bool infinite_ = false;
};

}  // namespace sonicmoe
