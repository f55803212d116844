// How many bytes a layer needs, before running it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "sonicmoe/moe.hpp"

namespace sonicmoe {

/// Bytes of one MoE layer, beside X, the parameters and their gradients. `kept` lives from forward
/// to backward; `transient_*` only during the call.
struct MemoryEstimate {
  std::size_t kept_h = 0;             ///< P * g*n elements
  std::size_t kept_metadata = 0;      ///< indices of this library and the caller's ids and weights
  std::size_t transient_forward = 0;  ///< A and Y (or a slab of Y)
  /// Beside what is kept, of a backward in steps whose caller frees H after kHidden and A' after
  /// kDown: dH and A', or dX~ (or a slab of it) where that is more. One call with
  /// BackwardStep::kAll, or an H that stays: moe_backward_workspace().
  std::size_t transient_backward = 0;
  std::size_t kept() const noexcept { return kept_h + kept_metadata; }
};

/// This library, without Y and dX~ where shape.deterministic is off (CUDA). The transients are
/// those of the kernels' buffers; a CPU call adds per-thread panels, which moe_forward_workspace()
/// counts.
SONICMOE_API MemoryEstimate estimate_memory(const MoEShape& shape,
                                            std::optional<std::size_t> workspace_limit = {});

/// ScatterMoE for comparison: keeps H, A and Y, P * (g*n + n + d) elements.
SONICMOE_API MemoryEstimate estimate_memory_scattermoe(const MoEShape& shape);

/// Bytes of the parameters of one layer: E * (g*n*d + d*n) elements (+ biases are not counted).
SONICMOE_API std::size_t parameter_bytes(const MoEShape& shape);

/// Model FLOPs of forward (padding never counts): 2 P d n (g + 1).
SONICMOE_API double forward_flops(const MoEShape& shape);
/// Of backward: twice as many.
SONICMOE_API double backward_flops(const MoEShape& shape);

}  // namespace sonicmoe
