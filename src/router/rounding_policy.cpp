#include "router/rounding_policy.hpp"

#include <cstdlib>

#include "math/philox.hpp"
#include "sonicmoe/error.hpp"

namespace sonicmoe {

RowRounder::RowRounder(const RoundingOptions& options, std::int64_t num_tokens)
    : tile_(options.tile),
      num_tokens_(num_tokens),
      policy_(options.policy),
      seed_(options.seed_tensor.defined()
                ? static_cast<std::uint64_t>(*options.seed_tensor.as<std::int64_t>())
                : options.seed) {}

bool RowRounder::nearest_is_up(std::int64_t rows) const {
  const std::int64_t remainder = rows % tile_;
  if (remainder * 2 != tile_) return remainder * 2 > tile_;
  return (rows / tile_) % 2 != 0;  // a tie goes to the even multiple
}

bool RowRounder::rounds_up(std::int64_t expert, std::int64_t rows, bool up_changes_less) const {
  const std::int64_t remainder = rows % tile_;
  switch (policy_) {
    case RoundingPolicy::kUp:
      return true;
    case RoundingPolicy::kDown:
      return false;
    case RoundingPolicy::kNearest:
      return nearest_is_up(rows);
    case RoundingPolicy::kStochastic: {
      // bits / 2^32 < remainder / M; both sides are below 2^63, since M <= T < 2^31.
      const std::uint64_t bits = rounding_bits(seed_, static_cast<std::uint32_t>(expert));
      return bits * static_cast<std::uint64_t>(tile_) < static_cast<std::uint64_t>(remainder) << 32;
    }
    case RoundingPolicy::kBalanced: {
      const std::int64_t after_down = std::abs(carry_ - remainder);
      const std::int64_t after_up = std::abs(carry_ - remainder + tile_);
      return after_up != after_down ? after_up < after_down : nearest_is_up(rows);
    }
    case RoundingPolicy::kNearestScore:
      return up_changes_less;
  }
  return false;
}

std::int64_t RowRounder::next(std::int64_t expert, std::int64_t rows, bool up_changes_less) {
  std::int64_t rounded = rows - rows % tile_;
  const bool up_fits = rows <= num_tokens_ - num_tokens_ % tile_;  // ceil_M(f) <= T
  if (rounded != rows && up_fits && rounds_up(expert, rows, up_changes_less)) rounded += tile_;
  carry_ += rounded - rows;
  return rounded;
}

}  // namespace sonicmoe
