// Row blocks: how the rows of the experts are split into independent tasks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/integers.hpp"
#include "core/metadata.hpp"

namespace sonicmoe::cpu {

/// Rows [first, first + rows) of one expert.
struct RowBlock {
  std::int64_t expert;
  std::int64_t first;
  std::int64_t rows;
};

/// Rows of a block, at most. 256 rows x 256 columns of float32 fill a 256 KB corner of the L2.
inline constexpr std::int64_t kRowBlock = 256;
/// Blocks have a multiple of this many rows except an expert's last, so that few shapes occur.
inline constexpr std::int64_t kRowQuantum = 32;
/// Columns of Y and dX~ that one GEMM computes; slabs under a workspace limit are multiples of it.
inline constexpr std::int64_t kColumnBlock = 128;

/// Upper bound on the number of blocks of P rows over E experts.
inline std::int64_t max_row_blocks(std::int64_t num_pairs, std::int64_t num_experts) {
  return num_pairs / kRowBlock + std::min(num_pairs, num_experts);
}

/// Splits each expert's rows into blocks of nearly equal size; returns their number. The split
/// depends on the row counts alone.
inline std::int64_t make_row_blocks(const Metadata& m, RowBlock* blocks) {
  std::int64_t count = 0;
  for (std::int64_t e = 0; e < m.num_experts; ++e) {
    const std::int64_t end = m.offsets[e];
    const std::int64_t rows = end - m.first_row(e);
    if (rows == 0) continue;
    const std::int64_t size = round_up(ceil_div(rows, ceil_div(rows, kRowBlock)), kRowQuantum);
    for (std::int64_t r = m.first_row(e); r < end; r += size) {
      blocks[count++] = {e, r, std::min(size, end - r)};
    }
  }
  return count;
}

}  // namespace sonicmoe::cpu
