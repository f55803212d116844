// Forward and backward of the experts on the CPU.
#pragma once

#include <optional>

#include "core/plan.hpp"

namespace sonicmoe::cpu {

ExpertPlan plan_forward(int threads, const MoEShape& shape, bool inference,
                        std::optional<std::size_t> limit);
void forward(int threads, const ExpertPlan& plan, const MoEForwardArgs& args);

ExpertPlan plan_backward(int threads, const MoEShape& shape, std::optional<std::size_t> limit);

/// What the router of a layer adds to dX, in the float32 sum over a token's rows.
struct RouterGradX {
  ConstTensorView grad_logits;    ///< [T, E] float32 contiguous
  ConstTensorView router_weight;  ///< Wr [E, d], dtype of x or float32, unit stride in d
};

/// Backward is two steps, between which a layer's router finds its gradient: first dS, dH and A',
/// then the gradients of everything else, with dX += grad_logits Wr where there is a `router`.
/// The first adds nothing to gradients that accumulate.
void backward_rows(int threads, const ExpertPlan& plan, const MoEBackwardArgs& args);
void backward_gradients(int threads, const ExpertPlan& plan, const MoEBackwardArgs& args,
                        const RouterGradX* router);

}  // namespace sonicmoe::cpu
