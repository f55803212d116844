// Token rounding of one expert's rows, f -> floor_M(f) or ceil_M(f): integers only, so every
// backend takes the same of the two.
#pragma once

#include <cstdint>

#include "math/host_device.hpp"
#include "math/philox.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe {

/// Whether ceil_M(f) <= T: else the floor is taken, whatever the policy says.
SONICMOE_HD bool up_fits(std::int64_t rows, std::int64_t tile, std::int64_t num_tokens) {
  return rows <= num_tokens - num_tokens % tile;
}

/// The closer multiple; a tie goes to the even one.
SONICMOE_HD bool nearest_is_up(std::int64_t rows, std::int64_t tile) {
  const std::int64_t remainder = rows % tile;
  if (remainder * 2 != tile) return remainder * 2 > tile;
  return (rows / tile) % 2 != 0;
}

/// `balanced`, with carry = sum of f' - f so far: what leaves it least in size, ties by `nearest`.
SONICMOE_HD bool balanced_is_up(std::int64_t carry, std::int64_t remainder, std::int64_t tile,
                                bool nearest) {
  const std::int64_t down = carry - remainder, up = down + tile;
  const std::int64_t after_down = down < 0 ? -down : down, after_up = up < 0 ? -up : up;
  return after_up != after_down ? after_up < after_down : nearest;
}

/// For f that is no multiple of M. `up_changes_less`: what nearest_score decides by. Of `balanced`,
/// which goes through the experts in order, this is `nearest`, for balanced_is_up().
SONICMOE_HD bool rounds_up(RoundingPolicy policy, std::int64_t rows, std::int64_t tile,
                           std::uint64_t seed, std::int64_t expert, bool up_changes_less) {
  switch (policy) {
    case RoundingPolicy::kUp:
      return true;
    case RoundingPolicy::kDown:
      return false;
    case RoundingPolicy::kNearest:
    case RoundingPolicy::kBalanced:
      return nearest_is_up(rows, tile);
    case RoundingPolicy::kStochastic: {
      // bits / 2^32 < remainder / M; both sides are below 2^63, since M <= T < 2^31.
      const std::uint64_t bits = rounding_bits(seed, static_cast<std::uint32_t>(expert));
      return bits * static_cast<std::uint64_t>(tile) < static_cast<std::uint64_t>(rows % tile)
                                                           << 32;
    }
    case RoundingPolicy::kNearestScore:
      return up_changes_less;
  }
  return false;
}

}  // namespace sonicmoe
