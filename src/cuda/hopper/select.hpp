// Which Spec serves a product, and in which order its tiles run. Pure host code without CUDA calls,
// so that it is tested on machines without a GPU. What none can serve: reasons.cpp.
#pragma once

#include <cstdint>

#include "cuda/hopper/choice.hpp"
#include "sonicmoe/tensor.hpp"

namespace sonicmoe::cuda::hopper {

enum class Product { kUp, kGradH, kRows, kWeightGradient, kLogits };

/// The sizes that decide.
struct ProductSizes {
  Product product = Product::kRows;
  std::int64_t depth = 0;       ///< of the reduction; weight gradient: rows of the mean expert
  std::int64_t columns = 0;     ///< of the product; up: g*n
  std::int64_t row_tiles = 0;   ///< tiles of 128 rows at most; weight gradient: of all experts
  std::int64_t num_tokens = 0;  ///< of out, where rows are added to it
  bool add_rows = false;
  bool stores_bf16 = false;  ///< weight gradient: not float32
  bool shared_device = false;
  int processors = 0;
};

Choice choose(const ProductSizes& sizes);

/// Width of the tile for `columns` columns: 256, or 128 where it pads enough less: narrow tiles
/// cost up to 8% more per column.
int choose_block_n(std::int64_t columns);

/// The longer the reduction (`hidden_size`), the more time a tile leaves for storing dH and the
/// more the gather has to do, so the fewer warps store (lab M16, M14).
StoreRoles choose_stores(std::int64_t hidden_size);

/// For a product that adds its rows to out [num_tokens, n_tiles * block_n]: column tiles that all
/// rows pass before the next ones begin, so that what is added to stays in L2; at most all. Each
/// group reads the rows again: worth it where the reduction, `depth`, is short and out far larger
/// than L2 (lab M10).
int choose_add_group(std::int64_t num_tokens, std::int64_t depth, int n_tiles, int block_n);

/// Tile rows of an expert that pass its columns together (tile_order.hpp), for a product whose
/// columns reduce over `depth` values: every tile row reads the same depth x columns of bf16, the
/// expert's weights, or of a weight gradient its sorted rows (depth: rows of the mean expert).
/// 1, columns fastest, where L2 keeps that from one tile row to the next. Beyond it 16: the CTAs of
/// a GPU then cover some 2048 rows x 2048 columns, the square that fetches least, and the operand
/// passes once per 2048 rows (lab M18).
int choose_row_block(std::int64_t depth, std::int64_t columns);

/// Whether the CTAs of a product over rows wait for each other before each tile: where the order in
/// blocks relies on them to walk the same long reduction side by side, and none can be missing (a
/// shared device) or be held up by additions to the same rows (lab M23).
bool choose_start_together(const ProductSizes& sizes, const Choice& choice);

/// Products::sorts_rows(): whether the gathered rows of a weight gradient [num_groups, width,
/// columns] are copied into the order of the row list first, which makes the product 4-15% faster.
/// A gathered row is read once for every 256 columns, so the copy pays from 8192 columns on: 32
/// readings, where it costs 17 to 43% of what it gains (lab M23; at 1536 and 3072 columns it costs
/// more than it gains). Not for groups of fewer than 256 rows in the mean, for which the copy of
/// their last steps would be a quarter of the whole. Never larger than the other operand, [P,
/// columns]: see docs/ops/memory.md.
bool choose_sorted(std::int64_t num_rows, std::int64_t num_groups, std::int64_t width,
                   std::int64_t columns);

/// Products::row_slices(): the slices that cost least, in waves of tiles times a tile's length. At
/// least 256 rows each, and at most three waves, which bound the parts to 49.5 MiB (they are summed
/// from L2) unless a single slice has more.
std::int64_t choose_slices(std::int64_t num_rows, std::int64_t width, std::int64_t columns);

/// Whether the reduction (K-major) or the other index of a weight [E, a, b] has unit stride, seen
/// from a product that reduces over dimension `depth_dim`.
bool depth_has_unit_stride(const ConstTensorView& w, int depth_dim);

}  // namespace sonicmoe::cuda::hopper
