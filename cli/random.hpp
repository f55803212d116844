// Random numbers that are the same on every machine (std:: distributions are not).
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <numbers>

namespace sonicmoe::cli {

/// splitmix64: small, seedable by any integer, good enough for test data.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  /// A generator of its own for every combination, so that cases do not depend on each other.
  Random(std::initializer_list<std::uint64_t> seeds) : state_(0) {
    for (const std::uint64_t seed : seeds) state_ = next() ^ seed;
    next();
  }

  std::uint64_t next() noexcept {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  /// Uniform in [0, 1).
  double uniform() noexcept { return static_cast<double>(next() >> 11) * 0x1p-53; }
  /// Uniform integer in [low, high].
  std::int64_t integer(std::int64_t low, std::int64_t high) noexcept {
    const auto span = static_cast<std::uint64_t>(high - low) + 1;
    return low + static_cast<std::int64_t>(next() % span);
  }
  bool chance(double probability) noexcept { return uniform() < probability; }
  /// Uniform with mean 0 and variance 1.
  float unit() noexcept {
    return static_cast<float>((uniform() - 0.5) * 2.0 * std::numbers::sqrt3);
  }
  /// Standard normal.
  double normal() noexcept {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    return radius * std::cos(2.0 * std::numbers::pi * uniform());
  }

 private:
  std::uint64_t state_;
};

}  // namespace sonicmoe::cli
