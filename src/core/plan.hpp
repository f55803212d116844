// Plans: what a call is made of, found once by the backend that serves it and read by everything
// below. The public size queries return the figures of the same plans.
#pragma once

#include <cstddef>

#include "sonicmoe/moe.hpp"

namespace sonicmoe {

/// A call of moe_forward or moe_backward.
struct ExpertPlan {
  MoEShape shape;
  /// Scratch. A limit that cannot be met gives the narrowest slabs, which are then too large.
  WorkspacePlan workspace;
  /// Backward: the workspace has room for the gathered rows in order, a copy that saves time.
  bool sorts_rows = false;
};

/// Whether a call with args.step does the work of `step`.
inline bool does(BackwardStep called, BackwardStep step) {
  return called == BackwardStep::kAll || called == step;
}

/// A call of moe_layer_forward or moe_layer_backward.
struct LayerPlan {
  ExpertPlan experts;            ///< their part of the scratch, and its slabs
  std::size_t router_bytes = 0;  ///< scratch of the router's products and of token rounding
  WorkspacePlan workspace;       ///< of the whole call
};

}  // namespace sonicmoe
