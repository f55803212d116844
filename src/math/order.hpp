// Floats as integers of the same order: what makes selection comparison and integer work only.
#pragma once

#include <cstdint>

#include "math/host_device.hpp"

namespace sonicmoe {

/// Increasing in `value`; -0 and +0 give the same key. NaN has the key 1, below all numbers, so
/// that a selection among NaN still returns legal indices. No value has the key 0 or 0xffffffff.
SONICMOE_HD std::uint32_t ordered_key(float value) {
  const std::uint32_t bits = bits_of(value + 0.0f);  // -0 + 0 = +0
  const auto sign = static_cast<std::uint32_t>(static_cast<std::int32_t>(bits) >> 31);
  return value == value ? bits ^ (sign | 0x80000000u) : 1;
}

/// The value of a key; NaN for NaN's and for 0.
SONICMOE_HD float key_value(std::uint32_t key) {
  return float_of((key >> 31) != 0 ? key & 0x7fffffffu : ~key);
}

/// Orders by descending `key`, then ascending index, when sorted by descending ranking key.
SONICMOE_HD std::uint64_t ranking_key(std::uint32_t key, std::int32_t index) {
  return (std::uint64_t{key} << 32) | (0xffffffffu - static_cast<std::uint32_t>(index));
}

/// The index inside a ranking key.
SONICMOE_HD std::int32_t ranking_index(std::uint64_t key) {
  return static_cast<std::int32_t>(0xffffffffu - static_cast<std::uint32_t>(key));
}

}  // namespace sonicmoe
