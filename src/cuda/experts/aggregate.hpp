// The memory-bound passes around the grouped GEMMs.
#pragma once

#include <cuda_runtime_api.h>

#include "core/metadata.hpp"
#include "cuda/products.hpp"

namespace sonicmoe::cuda {

/// Which tokens to visit.
struct TokenOrder {
  const std::int32_t* tokens = nullptr;      ///< [T] as RowTables::tokens, or null: all, by number
  const std::int32_t* num_tokens = nullptr;  ///< [1] how many of them, from the front, have rows
  /// false: out of a token without rows may stay as it is.
  bool zero_absent = true;
};

/// out[t, c] = sum over the rows of t, in input order, of weight * rows[row, c]  (+ out[t, c]),
/// float32 sum, one rounding, for `columns` columns. bfloat16.
/// `rows` is in row order: the K rows of a token lie apart. (In token order the down projection
/// would have to scatter them, which measured slower than gathering them here.)
struct AggregateArgs {
  const void* rows = nullptr;  ///< [C, rows_ld], 16-byte aligned
  std::int64_t rows_ld = 0;    ///< a multiple of 8
  ConstTensorView weights;     ///< by pair, float32|bfloat16, or absent for 1
  Matrix out;                  ///< [T, *], at the slab's first column
  bool add_to_out = false;     ///< what is there counts as one more row, the last
  std::int64_t columns = 0;
  TokenOrder tokens;
};
void aggregate(cudaStream_t stream, const MoEShape& shape, const Metadata& metadata,
               const AggregateArgs& args);

/// Zeroes out [T, d].
void zero_rows(cudaStream_t stream, const MoEShape& shape, Matrix out);

/// Sorted rows: zeroes rows R..P of out [P, columns].
void zero_tail(cudaStream_t stream, const MoEShape& shape, const Metadata& metadata, Matrix out,
               std::int64_t columns);

/// grad[pair] = sum over j of partial[row, j] (+ <grad_out[token], b2[e]>); 0 for a dropped pair.
void finish_weight_gradient(cudaStream_t stream, const MoEShape& shape, const Metadata& metadata,
                            const float* partial, int parts, Matrix grad_out, ConstTensorView b2,
                            float* grad);

/// grad[e, c] (+)= sum over the rows of e of row_weight[row] * values[source(row), c];
/// source(row) = row_token[row] when `by_token`, else row. `row_weight` null: 1.
void bias_gradient(cudaStream_t stream, const MoEShape& shape, const Metadata& metadata,
                   Matrix values, bool by_token, const float* row_weight, TensorView grad,
                   bool accumulate);

}  // namespace sonicmoe::cuda
