// Launching a Spec of the grouped GEMM, and the host-side pieces that the products share.
#pragma once

#include <algorithm>
#include <string>

#include "core/integers.hpp"
#include "core/log.hpp"
#include "cuda/device.hpp"
#include "cuda/hopper/epilogue/hidden_input.cuh"
#include "cuda/hopper/grouped_gemm.cuh"
#include "cuda/hopper/select.hpp"
#include "cuda/hopper/tensor_map.hpp"
#include "cuda/launch_check.hpp"
#include "cuda/products.hpp"

namespace sonicmoe::cuda::hopper {

inline void check_launch(cudaError_t status, const char* product, const ProductCall& call) {
  if (status == cudaSuccess) return;
  check_cuda(
      status, product,
      " (T=" + std::to_string(call.num_tokens) + ", P=" + std::to_string(call.num_rows) + ")");
}

/// What is chosen for a product on this call's GPU.
inline Choice choose(const ProductCall& call, const char* product, ProductSizes sizes) {
  check_launch(
      cudaDeviceGetAttribute(&sizes.processors, cudaDevAttrMultiProcessorCount, call.device),
      product, call);
  sizes.shared_device = call.shared_device;
  const Choice choice = choose(sizes);
  log_choice(product, [&] { return describe(choice); });
  return choice;
}

/// Clocks that a CTA waits for the others at most: half of what the products of its tile take.
inline int start_patience(int depth) {
  constexpr std::int64_t kHalfKTile = 512, kMost = 1 << 24;
  return static_cast<int>(std::min(kHalfKTile * ceil_div(depth, kBlockK), kMost));
}

/// Launches the CTAs of `choice`, if any.
template <class Spec>
void launch(const ProductCall& call, const Choice& choice, Params<Spec>& params) {
  constexpr int bytes = shared_bytes(Spec::shape);
  static_assert(bytes <= kSharedLimit);
  if (choice.grid <= 0) return;
  // Once per kernel and process would do on one device; the call is cheap and has no state.
  check_launch(cudaFuncSetAttribute(grouped_gemm_kernel<Spec>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
               Spec::name, call);
  OperandParams& o = params.operands;
  o.n_tiles = choice.n_tiles;
  o.n_group = choice.n_group;
  o.row_block = choice.row_block;
  o.early_release = choice.early_release;
  o.claims = choice.in_order ? call.rows.claims : nullptr;
  o.start_patience = choice.start_together ? start_patience(o.depth) : 0;
  grouped_gemm_kernel<Spec>
      <<<static_cast<unsigned>(choice.grid), kThreads, bytes, call.stream>>>(params);
  check_launch(cudaGetLastError(), Spec::name, call);
}

/// The operands that every kRows product over a row list sets alike.
inline OperandParams row_operands(const ProductCall& call, std::int64_t num_groups,
                                  std::int64_t depth) {
  OperandParams o{};
  o.row_token = call.rows.row_token;
  o.entries = call.rows.tiles;
  o.num_entries = call.rows.num_tiles;
  o.max_entries = static_cast<int>(tile_capacity(call.num_rows, num_groups));
  o.m_tiles = 1;
  o.depth = static_cast<int>(depth);
  return o;
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

inline HiddenLayout hidden_layout(const HiddenFunction& function) {
  if (!is_gated(function.activation)) return HiddenLayout::kPlain;
  return function.layout == GateUpLayout::kConcatenated ? HiddenLayout::kConcatenated
                                                        : HiddenLayout::kInterleaved;
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
