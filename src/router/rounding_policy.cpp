#include "router/rounding_policy.hpp"

#include "math/rounding.hpp"

namespace sonicmoe {

RowRounder::RowRounder(const RoundingOptions& options, std::int64_t num_tokens)
    : tile_(options.tile),
      num_tokens_(num_tokens),
      policy_(options.policy),
      seed_(options.seed_tensor.defined()
                ? static_cast<std::uint64_t>(*options.seed_tensor.as<std::int64_t>())
                : options.seed) {}

std::int64_t RowRounder::next(std::int64_t expert, std::int64_t rows, bool up_changes_less) {
  const std::int64_t remainder = rows % tile_;
  std::int64_t rounded = rows - remainder;
  if (remainder != 0 && up_fits(rows, tile_, num_tokens_)) {
    bool up = rounds_up(policy_, rows, tile_, seed_, expert, up_changes_less);
    if (policy_ == RoundingPolicy::kBalanced) up = balanced_is_up(carry_, remainder, tile_, up);
    if (up) rounded += tile_;
  }
  carry_ += rounded - rows;
  return rounded;
}

}  // namespace sonicmoe
