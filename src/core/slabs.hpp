// Slabs of columns of d: how Y and dX~ fit under a workspace limit.
#pragma once

#include <algorithm>
#include <optional>
#include <string>

#include "core/integers.hpp"
#include "sonicmoe/error.hpp"
#include "sonicmoe/moe.hpp"

namespace sonicmoe {

/// The plan with the widest slabs under `limit`. bytes_with(columns) gives the scratch of a call
/// with slabs of that many columns, and grows with them. Slabs are multiples of `step`, the column
/// block of the GEMMs that fill them, so that every column is computed by the same call with and
/// without a limit, bit for bit.
template <class BytesWith>
WorkspacePlan plan_slabs(const char* operation, std::int64_t hidden_size, std::int64_t step,
                         std::optional<std::size_t> limit, BytesWith bytes_with) {
  WorkspacePlan plan;
  const std::int64_t least = std::min(hidden_size, step);
  plan.minimum_bytes = bytes_with(least);
  plan.slab_columns = hidden_size;
  if (limit) {
    if (*limit < plan.minimum_bytes) {
      throw Error(operation, "workspace_limit",
                  "at least " + std::to_string(plan.minimum_bytes) + " bytes",
                  std::to_string(*limit));
    }
    if (bytes_with(hidden_size) > *limit) {
      std::int64_t fits = 1, too_many = ceil_div(hidden_size, step);  // in steps
      while (too_many - fits > 1) {
        const std::int64_t steps = fits + (too_many - fits) / 2;
        (bytes_with(steps * step) > *limit ? too_many : fits) = steps;
      }
      plan.slab_columns = fits * step;
    }
  }
  plan.bytes = bytes_with(plan.slab_columns);
  plan.num_slabs = static_cast<int>(ceil_div(hidden_size, plan.slab_columns));
  return plan;
}

}  // namespace sonicmoe
