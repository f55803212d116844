// Floats as integers of the same order: what makes selection comparison and integer work only.
#pragma once

#include <bit>
#include <cstdint>

namespace sonicmoe {

/// Increasing in `value`; -0 and +0 give the same key. `value` is not NaN.
inline std::uint32_t ordered_key(float value) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(value + 0.0f);  // -0 + 0 = +0
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

/// The value of a key.
inline float key_value(std::uint32_t key) noexcept {
  return std::bit_cast<float>((key >> 31) != 0 ? key & 0x7fffffffu : ~key);
}

/// Orders by descending value, then ascending index, when sorted by descending key.
inline std::uint64_t ranking_key(float value, std::int64_t index) noexcept {
  return (std::uint64_t{ordered_key(value)} << 32) |
         (0xffffffffu - static_cast<std::uint32_t>(index));
}

/// The index inside a ranking_key.
inline std::int64_t ranking_index(std::uint64_t key) noexcept {
  return static_cast<std::int64_t>(0xffffffffu - static_cast<std::uint32_t>(key));
}

}  // namespace sonicmoe
