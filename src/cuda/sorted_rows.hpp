// A copy of gathered rows in the order of the row list (lab M23): what a weight gradient of few
// large experts reads by TMA in place of gathering it again for every tile of columns.
#pragma once

#include <cstdint>

#include "cuda/products.hpp"
#include "math/host_device.hpp"

namespace sonicmoe::cuda {

/// Rows at which the reductions of all kernels step; an expert's last step is stored a second time.
inline constexpr int kSortedStep = 64;

/// Where the rows of the group begin whose first row of the list is `row`. They follow in order.
/// Behind R rows of a group, R no multiple of 64, lie the 64 rows of its last step: zeros for rows
/// of the step before and then the rest, or with R < 64 the rows and then zeros.
SONICMOE_HD constexpr int sorted_row(int row, int group) { return row + kSortedStep * group; }

/// Rows to allocate.
inline std::int64_t sorted_capacity(std::int64_t num_rows, std::int64_t num_groups) {
  return num_rows + kSortedStep * num_groups;
}

/// Whether the weight gradients of this shape take sorted rows.
bool sorts_rows(std::int64_t num_rows, std::int64_t num_groups, std::int64_t width);

/// Enqueues the copy of `gathered` [T, width] to `sorted` [sorted_capacity(), width] contiguous.
/// width is a multiple of 8, rows start at 16 bytes.
void sort_rows(const ProductCall& call, const Matrix& gathered, std::int64_t width,
               std::int64_t num_groups, void* sorted);

}  // namespace sonicmoe::cuda
