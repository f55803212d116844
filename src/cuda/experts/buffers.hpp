// What forward and backward share: the call's description, slabs, routing weights.
#pragma once

#include "cuda/experts/aggregate.hpp"
#include "cuda/experts/gemms.hpp"
#include "cuda/experts/metadata.hpp"
#include "cuda/launch_check.hpp"
#include "sonicmoe/error.hpp"

namespace sonicmoe::cuda {

/// Slabs are multiples of the widest tile, so that a column is computed by the same tile with and
/// without a limit.
inline constexpr std::int64_t kSlabStep = 256;
inline constexpr std::size_t kElementBytes = 2;  // bfloat16

inline std::size_t elements(std::int64_t rows, std::int64_t columns) {
  return static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns);
}

/// Routing weights of any form; absent for sorted rows without weights.
inline ConstTensorView routing_weights(const Routing& routing) {
  if (const auto* topk = std::get_if<TopKRouting>(&routing)) return topk->topk_weights;
  if (const auto* pairs = std::get_if<PairRouting>(&routing)) return pairs->pair_weights;
  return std::get<SortedRouting>(routing).row_weights;
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

/// Throws when the kernels decline the call.
inline void require(const char* operation, const std::string& reason) {
  if (reason.empty()) return;
  throw Error(std::string("cuda ") + operation + ": " + reason);
}

/// Runs a grouped GEMM, or says why it cannot.
#define SONICMOE_RUN_GEMM(call, operation, ...)                   \
  do {                                                            \
    const auto gemm_args = __VA_ARGS__;                           \
    require(#operation, hopper::reason_against(call, gemm_args)); \
    hopper::operation(call, gemm_args);                           \
  } while (false)

/// The plan with the widest slabs under `limit`; bytes_with(columns) is the scratch of a call.
template <class BytesWith>
WorkspacePlan plan_slabs(const char* operation, std::int64_t hidden_size,
                         std::optional<std::size_t> limit, BytesWith bytes_with) {
  WorkspacePlan plan;
  const std::int64_t least = hidden_size < kSlabStep ? hidden_size : kSlabStep;
  plan.minimum_bytes = bytes_with(least);
  plan.slab_columns = hidden_size;
  if (limit && *limit < plan.minimum_bytes) {
    throw Error(operation, "workspace_limit",
                "at least " + std::to_string(plan.minimum_bytes) + " bytes",
                std::to_string(*limit));
  }
  while (limit && plan.slab_columns > least && bytes_with(plan.slab_columns) > *limit) {
    plan.slab_columns = (plan.slab_columns - 1) / kSlabStep * kSlabStep;
  }
  plan.bytes = bytes_with(plan.slab_columns);
  plan.num_slabs =
      hidden_size == 0
          ? 1
          : static_cast<int>((hidden_size + plan.slab_columns - 1) / plan.slab_columns);
  return plan;
}

}  // namespace sonicmoe::cuda
