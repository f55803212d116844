// What forward and backward share: the call's description, slabs, routing weights.
#pragma once

#include "core/check.hpp"
#include "core/slabs.hpp"
#include "cuda/experts/aggregate.hpp"
#include "cuda/experts/gemms.hpp"
#include "cuda/experts/metadata.hpp"
#include "cuda/launch_check.hpp"

namespace sonicmoe::cuda {

/// Slabs are multiples of the widest tile, so that a column is computed by the same tile with and
/// without a limit.
inline constexpr std::int64_t kSlabStep = 256;
inline constexpr std::size_t kElementBytes = 2;  // bfloat16

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

inline ExpertCall expert_call(const Context& context, const MoEShape& shape,
                              const ExpertOptions& options, const Metadata& metadata,
                              const RowTables& tables) {
  return {shape, options, row_lists(metadata, tables),
          static_cast<cudaStream_t>(context.stream.handle), context.device.index};
}

inline Matrix matrix(const ConstTensorView& view) {
  return {const_cast<void*>(view.data()), view.stride(0)};
}

/// Runs a grouped GEMM. What it cannot take has been refused before the first launch of the call.
#define SONICMOE_RUN_GEMM(call, operation, ...)                                  \
  do {                                                                           \
    const auto gemm_args = __VA_ARGS__;                                          \
    Check(#operation, Device{}).refuse(hopper::reason_against(call, gemm_args)); \
    hopper::operation(call, gemm_args);                                          \
  } while (false)

}  // namespace sonicmoe::cuda
