// Row blocks: how the rows of the experts are split into independent tasks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "core/integers.hpp"
#include "core/metadata.hpp"
#include "sonicmoe/dtype.hpp"

namespace sonicmoe::cpu {

/// Rows [first, first + rows) of one expert.
struct RowBlock {
  std::int64_t expert;
  std::int64_t first;
  std::int64_t rows;
};

/// What one GEMM computes, at most. oneDNN packs both operands in every call: the more rows and
/// columns, the more products a packed element serves. bfloat16 multiplies so fast that 512 x 512
/// gains a tenth over 256 x 128; in float32, 256 x 256 fill a 256 KB corner of the L2.
template <class Compute>
struct Tile {
  static constexpr bool kBfloat16 = std::is_same_v<Compute, bfloat16>;
  /// Rows of a block.
  static constexpr std::int64_t kRows = kBfloat16 ? 512 : 256;
  /// Hidden units handled together; a gated panel is 2 * kUnits columns wide.
  static constexpr std::int64_t kUnits = kBfloat16 ? 512 : 128;
  /// Columns of Y and dX~; slabs under a workspace limit are multiples of it.
  static constexpr std::int64_t kColumns = kBfloat16 ? 512 : 128;
};

/// Blocks have a multiple of this many rows except an expert's last, so that few shapes occur.
inline constexpr std::int64_t kRowQuantum = 16;

/// Upper bound on the number of blocks of at most `num_rows` rows over E experts.
template <class Compute>
std::int64_t max_row_blocks(std::int64_t num_rows, std::int64_t num_experts) {
  return num_rows / Tile<Compute>::kRows + std::min(num_rows, num_experts);
}

/// Splits each expert's rows into blocks of nearly equal size and orders them largest first, so
/// that threads end together; returns their number. The split depends on the row counts alone.
template <class Compute>
std::int64_t make_row_blocks(const Metadata& m, RowBlock* blocks) {
  std::int64_t count = 0;
  for (std::int64_t e = 0; e < m.num_experts; ++e) {
    const std::int64_t end = m.offsets[e];
    const std::int64_t rows = end - m.first_row(e);
    if (rows == 0) continue;
    const std::int64_t size =
        round_up(ceil_div(rows, ceil_div(rows, Tile<Compute>::kRows)), kRowQuantum);
    for (std::int64_t r = m.first_row(e); r < end; r += size) {
      blocks[count++] = {e, r, std::min(size, end - r)};
    }
  }
  std::stable_sort(blocks, blocks + count,
                   [](const RowBlock& a, const RowBlock& b) { return a.rows > b.rows; });
  return count;
}

}  // namespace sonicmoe::cpu
