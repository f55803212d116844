// What forward and backward share: the call's description, slabs, routing weights.
#pragma once

#include "core/check.hpp"
#include "core/slabs.hpp"
#include "cuda/device.hpp"
#include "cuda/element.hpp"
#include "cuda/experts/aggregate.hpp"
#include "cuda/experts/metadata.hpp"
#include "cuda/launch_check.hpp"
#include "cuda/products.hpp"
#include "cuda/range.hpp"

namespace sonicmoe::cuda {

/// Slabs are multiples of the widest tile, so that a column is computed by the same tile with and
/// without a limit.
inline constexpr std::int64_t kSlabStep = 256;

inline std::size_t elements(std::int64_t rows, std::int64_t columns) {
  return static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns);
}

/// Whether Y and dX~ are stored row by row and then summed per token, or added to their tokens'
/// rows at once; neither for sorted rows, which are the output themselves.
inline bool stores_rows(const MoEShape& shape) {
  return shape.form != MoEShape::Form::kSorted && shape.deterministic;
}
inline bool adds_rows(const MoEShape& shape) {
  return shape.form != MoEShape::Form::kSorted && !shape.deterministic;
}

inline ProductCall product_call(const Context& context, const MoEShape& shape,
                                const RowLists& rows = {}) {
  return {.num_tokens = shape.num_tokens,
          .num_rows = shape.row_capacity(),
          .rows = rows,
          .stream = static_cast<cudaStream_t>(context.stream.handle),
          .device = context.device.index,
          .shared_device = context.shared_device};
}

inline HiddenFunction hidden_function(const MoEShape& shape, const ExpertOptions& options) {
  return {shape.activation, options.gate_up_layout, options.limit};
}

inline TokenOrder token_order(const RowTables& tables, const ExpertOptions& options) {
  return {tables.tokens, tables.num_tokens, options.zero_absent_tokens};
}

inline Matrix matrix(const ConstTensorView& view) {
  return {const_cast<void*>(view.data()), view.stride(0)};
}

/// Runs a product. What it cannot take has been refused before the first launch of the call.
template <class Args>
void run(const ProductCall& call, const char* name, const Args& args) {
  const Range range(name);
  const Products& products = products_of(call.device);
  Check(name, Device{}).refuse(products.reason_against(call, args));
  products.run(call, args);
}

}  // namespace sonicmoe::cuda
