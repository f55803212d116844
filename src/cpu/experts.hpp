// Forward and backward of the experts on the CPU.
#pragma once

#include <optional>

#include "core/plan.hpp"

namespace sonicmoe::cpu {

ExpertPlan plan_forward(int threads, const MoEShape& shape, bool inference,
                        std::optional<std::size_t> limit);
void forward(int threads, const ExpertPlan& plan, const MoEForwardArgs& args);

ExpertPlan plan_backward(int threads, const MoEShape& shape, std::optional<std::size_t> limit,
                         BackwardStep step);

/// What the router of a layer adds to dX, in the float32 sum over a token's rows.
struct RouterGradX {
  ConstTensorView grad_logits;    ///< [T, E] float32 contiguous
  ConstTensorView router_weight;  ///< Wr [E, d], dtype of x or float32, unit stride in d
};

/// The steps of backward that args.step asks for, one of which `run` is; in kAll they are called in
/// this order. kInput: with dX += grad_logits Wr where there is a `router`.
void backward_step(int threads, const ExpertPlan& plan, const MoEBackwardArgs& args,
                   BackwardStep run, const RouterGradX* router = nullptr);

}  // namespace sonicmoe::cpu
