// Launching a Spec of the grouped GEMM, and the host-side pieces the six operations share.
#pragma once

#include <algorithm>
#include <string>

#include "cuda/experts/gemms.hpp"
#include "cuda/hopper/epilogue/glu.cuh"
#include "cuda/hopper/grouped_gemm.cuh"
#include "cuda/hopper/select.hpp"
#include "cuda/hopper/tensor_map.hpp"
#include "cuda/launch_check.hpp"

namespace sonicmoe::cuda::hopper {

/// Whether a product's tiles are handed out in order or strided (schedule.cuh), from measurements
/// on H100s and H200s. Up and dH gain up to 20% in order (neighbours share the rows they gather);
/// of the others `down` with few k-tiles and so many tiles that the CTAs would drift far apart, and
/// products with large weights, which CTAs at different experts fetch again and again: 1-4% at 8 MB
/// and more, while at 1.5 MB the same order costs 1-2%.
/// Products that add their rows to out (n_group > 0) work on one part of out at a time; strided
/// they took up to 1.5 times as long.
template <class Spec>
bool in_order(const OperandParams& o, std::int64_t items, std::int64_t grid) {
  if (Spec::shape.grouping == Grouping::kDepth) return false;
  constexpr std::int64_t kMostWeight = 6 << 20;  // bytes of an expert
  const std::int64_t weight = std::int64_t{2} * o.depth * o.n_tiles * Spec::shape.block_n;
  return Spec::shape.gather || o.n_group > 0 || weight > kMostWeight ||
         (o.depth <= 256 && items > 256 * grid);
}

/// Whether stages are handed back early when data is short, from measurements on an H100: 2-6%
/// faster where reductions are short and the ring runs dry at every tile, 2-5% slower where the
/// loaders nearly keep up. Never in weight gradients: 1-3% slower on an H200 under lasting load.
template <class Spec>
bool early_release(const OperandParams& o) {
  if (Spec::shape.grouping == Grouping::kDepth) return false;
  return o.depth <= (Spec::shape.gather ? 2048 : 512);
}

/// Tile rows that pass the columns together: 1 where columns come in groups, an order of their own.
template <class Spec>
int row_block(const ExpertCall& call, const OperandParams& o) {
  if (o.n_group != o.n_tiles) return 1;
  const std::int64_t mean_rows = ceil_div(call.shape.num_pairs, std::max(o.max_entries, 1));
  return choose_row_block(Spec::shape.grouping == Grouping::kRows ? o.depth : mean_rows,
                          std::int64_t{o.n_tiles} * Spec::shape.block_n);
}

/// Launches one CTA per multiprocessor (fewer when there are fewer tiles at most). `max_items`
/// bounds the tiles that can exist.
template <class Spec>
void launch(const ExpertCall& call, const Params<Spec>& params, std::int64_t max_items) {
  constexpr int bytes = shared_bytes(Spec::shape);
  static_assert(bytes <= kSharedLimit);
  // Once per kernel and process would do on one device; the call is cheap and has no state.
  check_launch(cudaFuncSetAttribute(grouped_gemm_kernel<Spec>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
               Spec::name, call.shape);
  int processors = 0;
  check_launch(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, call.device),
               Spec::name, call.shape);
  const std::int64_t grid = std::min<std::int64_t>(grid_limit(processors), max_items);
  if (grid <= 0) return;
  Params<Spec> scheduled = params;
  scheduled.operands.claims =
      in_order<Spec>(params.operands, max_items, grid) ? call.rows.claims : nullptr;
  scheduled.operands.early_release = early_release<Spec>(params.operands);
  OperandParams& o = scheduled.operands;
  if (o.n_group == 0) o.n_group = o.n_tiles;
  o.row_block = row_block<Spec>(call, o);
  grouped_gemm_kernel<Spec>
      <<<static_cast<unsigned>(grid), kThreads, bytes, call.stream>>>(scheduled);
  check_launch(cudaGetLastError(), Spec::name, call.shape);
}

/// The operands of a kRows product that every operation sets alike.
inline OperandParams row_operands(const ExpertCall& call, std::int64_t depth, std::int64_t columns,
                                  int columns_per_tile) {
  OperandParams o{};
  o.row_token = call.rows.row_token;
  o.entries = call.rows.tiles;
  o.num_entries = call.rows.num_tiles;
  o.max_entries = static_cast<int>(tile_capacity(call.shape.num_pairs, call.shape.num_experts));
  o.m_tiles = 1;
  o.n_tiles = static_cast<int>(ceil_div(columns, columns_per_tile));
  o.depth = static_cast<int>(depth);
  return o;
}

inline std::int64_t max_items(const OperandParams& o) {
  return std::int64_t{o.max_entries} * o.m_tiles * o.n_tiles;
}

inline void set_gather(OperandParams& o, const Matrix& m) {
  o.gathered = static_cast<const bf16*>(m.data);
  o.gathered_ld = static_cast<std::uint32_t>(m.ld);
}

/// Whether `columns` columns can be loaded in boxes of several blocks of 64.
inline bool whole_blocks(std::int64_t columns, std::int64_t first_column = 0) {
  return columns % 64 == 0 && first_column % 64 == 0;
}

/// A [P, columns] contiguous, loaded in boxes of 64 rows x 64 columns.
inline CUtensorMap map_of_rows(const void* data, std::int64_t num_rows, std::int64_t columns) {
  return make_tensor_map(data, {columns, num_rows}, {columns}, {64, 64});
}

inline HiddenLayout hidden_layout(const ExpertCall& call) {
  if (!is_gated(call.shape.activation)) return HiddenLayout::kPlain;
  return call.options.gate_up_layout == GateUpLayout::kConcatenated ? HiddenLayout::kConcatenated
                                                                    : HiddenLayout::kInterleaved;
}

/// H [P, g*n] for HiddenInput, in boxes of four rows x block_n / 2 hidden units, dense in shared
/// memory: (unit, part, row), or (value, 1, row) where gate and up alternate. Concatenated, gate
/// and up are parts, so that gates past the end arrive as zeros and not as up.
inline CUtensorMap map_of_hidden(const void* h, std::int64_t num_rows, std::int64_t n,
                                 HiddenLayout layout, int block_n) {
  const std::int64_t parts = layout == HiddenLayout::kConcatenated ? 2 : 1;
  const std::int64_t values = layout == HiddenLayout::kInterleaved ? 2 : 1;  // of a unit, in a part
  return make_tensor_map(h, {values * n, parts, num_rows}, {values * n, parts * values * n},
                         {static_cast<int>(values) * block_n / 2, static_cast<int>(parts), 4},
                         CU_TENSOR_MAP_SWIZZLE_NONE);
}

/// The B operand of a kRows product: a weight [E, outer, inner], of which `column_dim` is the
/// product's column index and the other its reduction, from column `first_column`. K-major when the
/// reduction has unit stride, else MN-major. parts = 2 splits the columns into two halves, gate and
/// up, a tile into columns of either, so that columns past the end of the first arrive as zeros and
/// not as the second.
inline void set_weight(OperandParams& o, const ConstTensorView& w, int column_dim, int parts,
                       int block_n, Major major, std::int64_t first_column = 0) {
  const int depth_dim = 3 - column_dim;
  const std::int64_t columns = w.size(column_dim) / parts, depth = w.size(depth_dim);
  const std::int64_t column_stride = w.stride(column_dim), depth_stride = w.stride(depth_dim);
  constexpr std::int64_t kUnused = 64;  // of a dimension of one element; must still be legal
  const std::int64_t part_stride = parts == 1 ? kUnused : columns * column_stride;
  const std::int64_t expert_stride = w.size(0) == 1 ? kUnused : w.stride(0);
  o.paired = parts == 2;
  o.first_column = static_cast<int>(first_column);
  o.whole_boxes = whole_blocks(columns, first_column);
  if (major == Major::kK) {
    o.b = make_tensor_map(w.data(), {depth, columns, parts, w.size(0)},
                          {column_stride, part_stride, expert_stride},
                          {64, block_n / parts, parts, 1});
  } else if (o.whole_boxes) {
    o.b = make_tensor_map(w.data(), {64, depth, columns / 64, parts, w.size(0)},
                          {depth_stride, 64, part_stride, expert_stride},
                          {64, 64, block_n / 64 / parts, parts, 1});
  } else {
    o.b = make_tensor_map(w.data(), {columns, depth, parts, w.size(0)},
                          {depth_stride, part_stride, expert_stride}, {64, 64, 1, 1});
  }
}

}  // namespace sonicmoe::cuda::hopper
