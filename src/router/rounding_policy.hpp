// How many rows each expert has after token rounding: integer arithmetic only.
#pragma once

#include <cstdint>

#include "sonicmoe/router.hpp"

namespace sonicmoe {

/// f -> f' for one expert after the other, in expert order (`balanced` carries from one to the
/// next).
class RowRounder {
 public:
  /// `seed` of kStochastic: the options' or the seed tensor's.
  RowRounder(const RoundingOptions& options, std::int64_t num_tokens);

  /// The rounded count of `expert`, which token choice gave `rows` rows. `up_changes_less`: what
  /// kNearestScore decides by; unused by the others.
  std::int64_t next(std::int64_t expert, std::int64_t rows, bool up_changes_less);

 private:
  std::int64_t tile_;
  std::int64_t num_tokens_;
  RoundingPolicy policy_;
  std::uint64_t seed_;
  std::int64_t carry_ = 0;  // sum of f' - f so far
};

}  // namespace sonicmoe
