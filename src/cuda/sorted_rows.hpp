// A copy of gathered rows in the order of the row list, which a weight gradient reads by TMA in
// place of gathering them again for every tile of columns (Products::sorts_rows()): where its rows
// lie. experts/sorted_rows.cu writes it.
#pragma once

#include <cstdint>

#include "math/host_device.hpp"

namespace sonicmoe::cuda {

/// Rows at which the reductions of all kernels step.
inline constexpr int kSortedStep = 64;

/// Where the rows of the group begin whose first row of the list is `row`. They follow in order.
/// Behind R rows of a group, where R is no multiple of 64, the 64 rows of its last step come once
/// more, zeros where the step before has them; of a group with R < 64 its rows and then zeros. So
/// every step is 64 rows in a row, and brings no row of another group. What lies between is
/// neither written nor read.
SONICMOE_HD constexpr int sorted_row(int row, int group) { return row + kSortedStep * group; }

/// Rows to allocate.
constexpr std::int64_t sorted_capacity(std::int64_t num_rows, std::int64_t num_groups) {
  return num_rows + kSortedStep * num_groups;
}

}  // namespace sonicmoe::cuda
