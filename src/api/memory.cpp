#include "sonicmoe/memory.hpp"

#include <algorithm>

#include "api/checks.hpp"

namespace sonicmoe {
namespace {

// The caller's int32 id and float32 weight of each pair (pair lists: a token id more).
std::size_t routing_bytes(const MoEShape& shape) {
  const std::size_t per_pair = shape.form == MoEShape::Form::kSorted  ? 4
                               : shape.form == MoEShape::Form::kPairs ? 12
                                                                      : 8;
  return static_cast<std::size_t>(shape.num_pairs) * per_pair;
}

// `least` stays; the R x d buffer shrinks to what the limit leaves.
std::size_t under_limit(std::size_t least, std::size_t all, std::optional<std::size_t> limit) {
  return limit ? std::max(least, std::min(all, *limit)) : all;
}

}  // namespace

MemoryEstimate estimate_memory(const MoEShape& shape, std::optional<std::size_t> workspace_limit) {
  check_countable(Check("estimate_memory", Device{}), shape);
  const std::size_t element = size_of(shape.numerics.storage);
  const auto rows = static_cast<std::size_t>(shape.row_capacity());
  const auto n = static_cast<std::size_t>(shape.intermediate_size);
  const auto d = static_cast<std::size_t>(shape.hidden_size);
  const auto h = static_cast<std::size_t>(shape.h_columns());
  const bool stores_rows = shape.deterministic || shape.form == MoEShape::Form::kSorted;
  const std::size_t wide = stores_rows ? rows * d * element : 0;  // Y, dX~
  MemoryEstimate estimate;
  estimate.kept_h = moe_h_bytes(shape);
  estimate.kept_metadata = moe_metadata_bytes(shape) + routing_bytes(shape);
  const std::size_t a = rows * n * element, dh = rows * h * element;
  estimate.transient_forward = under_limit(a, a + wide, workspace_limit);
  // While dX~ lives, dH has taken the place of H, which is as large.
  const std::size_t all = under_limit(dh + a, dh + std::max(a, wide), workspace_limit);
  estimate.transient_backward = std::max(dh + a, all - dh);
  return estimate;
}

MemoryEstimate estimate_memory_scattermoe(const MoEShape& shape) {
  MemoryEstimate estimate = estimate_memory(shape);
  // H stays, and dX~ comes beside dH.
  const auto most = static_cast<std::size_t>(
      shape.num_pairs * (shape.h_columns() + std::max(shape.intermediate_size, shape.hidden_size)));
  estimate.transient_backward = most * size_of(shape.numerics.storage);
  const auto kept_rows = static_cast<std::size_t>(
      shape.num_pairs * (shape.h_columns() + shape.intermediate_size + shape.hidden_size));
  estimate.kept_h = kept_rows * size_of(shape.numerics.storage);
  return estimate;
}

std::size_t parameter_bytes(const MoEShape& shape) {
  check_countable(Check("parameter_bytes", Device{}), shape);
  const std::int64_t columns = shape.h_columns() + shape.intermediate_size;
  return static_cast<std::size_t>(shape.num_experts * columns * shape.hidden_size) *
         size_of(shape.numerics.storage);
}

double forward_flops(const MoEShape& shape) {
  check_countable(Check("forward_flops", Device{}), shape);
  return 2.0 * static_cast<double>(shape.num_pairs) * static_cast<double>(shape.hidden_size) *
         static_cast<double>(shape.intermediate_size) * (gate_factor(shape.activation) + 1);
}

double backward_flops(const MoEShape& shape) { return 2.0 * forward_flops(shape); }

}  // namespace sonicmoe
