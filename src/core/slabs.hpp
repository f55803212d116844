// Slabs of columns of d: how Y and dX~ fit under a workspace limit.
#pragma once

#include <algorithm>
#include <optional>

#include "core/integers.hpp"
#include "core/plan.hpp"

namespace sonicmoe {

/// The plan with the widest slabs under `limit`, or with the narrowest where none fit.
/// bytes_with(columns) gives the scratch of a call with slabs of that many columns, and grows with
/// them. Slabs are multiples of `step`, the column block of the GEMMs that fill them, so that every
/// column is computed by the same call with and without a limit, bit for bit.
template <class BytesWith>
ExpertPlan plan_slabs(const MoEShape& shape, std::int64_t step, std::optional<std::size_t> limit,
                      BytesWith bytes_with) {
  const std::int64_t columns = shape.hidden_size;
  WorkspacePlan plan;
  plan.minimum_bytes = bytes_with(std::min(columns, step));
  plan.slab_columns = columns;
  plan.bytes = bytes_with(columns);
  if (limit && plan.bytes > *limit) {
    std::int64_t fits = 1, too_many = ceil_div(columns, step);  // in steps
    while (too_many - fits > 1) {
      const std::int64_t steps = fits + (too_many - fits) / 2;
      (bytes_with(steps * step) > *limit ? too_many : fits) = steps;
    }
    plan.slab_columns = std::min(columns, fits * step);
    plan.bytes = bytes_with(plan.slab_columns);
  }
  plan.num_slabs = static_cast<int>(ceil_div(columns, plan.slab_columns));
  return {shape, plan};
}

/// The plan of one step of a backward, or of all: bytes_with(columns, step). A step has the slabs
/// and the minimum of all.
template <class BytesWith>
ExpertPlan plan_backward_slabs(const MoEShape& shape, std::int64_t columns_step,
                               std::optional<std::size_t> limit, BackwardStep step,
                               BytesWith bytes_with) {
  ExpertPlan plan = plan_slabs(shape, columns_step, limit, [&](std::int64_t columns) {
    return bytes_with(columns, BackwardStep::kAll);
  });
  plan.workspace.bytes = bytes_with(plan.workspace.slab_columns, step);
  return plan;
}

}  // namespace sonicmoe
