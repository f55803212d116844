// The router's gradient products on the experts' grouped products. dlogits goes in as bf16
// terms, high = bf16(dlogits) and low = bf16(dlogits - high), 16 bits in all, split from float32
// here or written so by the backward of renormalised weights:
//   router's dX [T, d] = high Wr    one group of T rows; rounded to bf16 as every row of dX~ is,
//                                   from a factor rounded as dH is
//   dWr [E, d] = (high + low)ᵀ x    slices of the tokens as groups, 2E columns, one per term:
//                                   x is gathered once, and the terms fill the tile's width
// Callers fall back on split_gemm.cuh where reason_against() declines (d no multiple of 8, ...).
#pragma once

#include <cuda_runtime_api.h>

#include "core/workspace.hpp"
#include "cuda/products.hpp"
#include "sonicmoe/context.hpp"

namespace sonicmoe::cuda::router {

/// Terms of dlogits in dWr.
inline constexpr int kWeightTerms = 2;

/// dlogits on its way to the products.
struct LogitsGradient {
  const void* data = nullptr;  ///< float32 [T, E]; split: bf16 [T, kWeightTerms, E], as many bytes
  std::int64_t num_tokens = 0;
  std::int64_t num_experts = 0;
  bool split = false;  ///< whether it holds its terms, which is what dWr reads
};

/// Scratch of one product.
struct GradientTerms {
  void* values = nullptr;  ///< [T, count, E] bf16: a token's high terms, then its low ones
  int count = 0;
  std::uint32_t* claims = nullptr;  ///< [RowLists::kCounters] of the grouped GEMM's schedule
  int4* tiles = nullptr;            ///< row tiles of the T rows
  std::int32_t* num_tiles = nullptr;
  int4* slices = nullptr;  ///< [num_slices] {first row, rows, slice, 0}
  std::int64_t num_slices = 0;
  std::int64_t rows_per_slice = 0;
};

/// For the router's dX: the high term and the row tiles.
GradientTerms carve_grad_x_terms(WorkspaceCarver& carver, std::int64_t num_tokens,
                                 std::int64_t num_experts);
/// For dWr: both terms and the slices, whose number (at least 1) is a function of the shape alone.
GradientTerms carve_weight_terms(WorkspaceCarver& carver, const Products& products,
                                 std::int64_t num_tokens, std::int64_t num_experts, std::int64_t d);

/// out [T, num_columns] bf16 = grad_logits router_weight[:, first_column...]. False, and nothing
/// enqueued, where the kernels decline. Where grad_logits is split, the high ones and the lists
/// are in `terms` already; else the slab at column 0, which comes first, puts them there for all.
bool grad_x_on_grouped_gemm(const Context& context, const LogitsGradient& grad_logits,
                            ConstTensorView router_weight, std::int64_t first_column,
                            std::int64_t num_columns, Matrix out, const GradientTerms& terms);

/// parts [num_slices, kWeightTerms, E, d] float32: slice s sums the tokens [s, s + 1) *
/// rows_per_slice, and dWr is the sum of all parts. False as above.
bool weight_parts_on_grouped_gemm(const Context& context, ConstTensorView x,
                                  const LogitsGradient& grad_logits, float* parts,
                                  const GradientTerms& terms);

/// Whether both products of the device of x take their grad_logits as terms: slabs of
/// `num_columns` of `grad_x` as `out` of the first.
bool products_take_terms(ConstTensorView x, ConstTensorView router_weight, std::int64_t num_columns,
                         Matrix grad_x);

}  // namespace sonicmoe::cuda::router
