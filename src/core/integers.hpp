// Integer arithmetic that every backend's sizes need.
#pragma once

#include <cstdint>
#include <limits>

namespace sonicmoe {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

/// Sums and products of sizes that stay at kTooLarge where the result does not fit: check once, at
/// the end.
inline constexpr std::int64_t kTooLarge = std::numeric_limits<std::int64_t>::max();
constexpr bool saturated(std::int64_t size) { return size == kTooLarge; }

constexpr std::int64_t saturating_add(std::int64_t a, std::int64_t b) {
  std::int64_t sum = 0;
  return __builtin_add_overflow(a, b, &sum) ? kTooLarge : sum;
}
constexpr std::int64_t saturating_mul(std::int64_t a, std::int64_t b) {
  std::int64_t product = 0;
  return __builtin_mul_overflow(a, b, &product) ? kTooLarge : product;
}

}  // namespace sonicmoe
