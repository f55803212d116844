// Which Spec serves a call, and which calls none can serve. Pure host code without CUDA calls, so
// that it is tested on machines without a GPU.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/experts/gemms.hpp"

namespace sonicmoe::cuda::hopper {

/// Width of the tile for `columns` output columns: 256, or 128 where it pads enough less. Measured
/// on dense products: 128 x 128 tiles cost 1% more per column at long reductions, 8% at short ones.
/// SONICMOE_CUDA_BLOCK_N=128 or 256 forces one (tests run every Spec).
int choose_block_n(std::int64_t columns);

/// For a gated up projection of `n` hidden units, whose tile holds block_n / 2 of them.
int choose_gated_block_n(std::int64_t n);

/// Who stores dH: of the four helper warps three or two, the others load; or three and the math
/// warps a quarter.
enum class HiddenStorers { kThreeAndMath, kThree, kTwo };

/// The longer the reduction (`hidden_size`), the more time a tile leaves for storing and the more
/// the gather has to do, so the fewer store. On an H200 the math warps' quarter makes dH 15% faster
/// at 768, 5% at 1536, 5% slower at 2048; three are 13% faster than two at 2048, 4% slower at
/// 4096. SONICMOE_CUDA_HIDDEN_STORERS=math, three or two forces one.
HiddenStorers choose_hidden_storers(std::int64_t hidden_size);

/// For a product that adds its rows to out [num_tokens, n_tiles * block_n]: column tiles that all
/// rows pass before the next ones begin, so that what is added to stays in L2; at most all. Each
/// group reads the rows again: measured worth it where the reduction, `depth`, is short and out far
/// larger than L2 (7B-n256 530 to 460 us). SONICMOE_CUDA_ADD_WINDOW=N makes groups of at most N MiB
/// of out, whatever the shape.
int choose_add_group(std::int64_t num_tokens, std::int64_t depth, int n_tiles, int block_n);

/// Tile rows of an expert that pass its columns together (tile_order.hpp), for a product whose
/// columns reduce over `depth` values: every tile row reads the same depth x columns of bf16, the
/// expert's weights, or of a weight gradient its sorted rows (depth: rows of the mean expert).
/// 1, columns fastest, where L2 keeps that from one tile row to the next. Beyond it 16: 132 CTAs
/// then cover some 2048 rows x 2048 columns, the square that fetches least, and the operand passes
/// once per 2048 rows. On an H200 (M18) `up` of Mixtral-8x7B took 31% less time; 4, 8 and 32 tile
/// rows and blocks of columns were no faster at any coarse shape, and blocks of what L2 holds up to
/// 2% slower. SONICMOE_CUDA_ROW_BLOCK=N forces one.
int choose_row_block(std::int64_t depth, std::int64_t columns);

/// CTAs to launch on a GPU of `processors` multiprocessors: one each, or SONICMOE_CUDA_GRID if set
/// (tests run grids of 1, 2, 7, 131).
int grid_limit(int processors);

/// Whether the reduction (K-major) or the other index of a weight [E, a, b] has unit stride, seen
/// from a product that reduces over dimension `depth_dim`.
bool depth_has_unit_stride(const ConstTensorView& w, int depth_dim);

}  // namespace sonicmoe::cuda::hopper
