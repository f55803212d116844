// What the operators of moe_backward and moe_layer_backward share: one step, and the last operator.
#pragma once

#include <tuple>

#include "gradients.hpp"

namespace sonicmoe_torch {

inline sonicmoe::WorkspacePlan backward_plan(const Call& call, const sonicmoe::MoEShape& shape,
                                             const sonicmoe::MoEBackwardArgs& args) {
  return sonicmoe::moe_backward_workspace(call.context(), shape, args.workspace_limit, args.step);
}
inline sonicmoe::WorkspacePlan backward_plan(const Call& call, const sonicmoe::MoEShape& shape,
                                             const sonicmoe::MoELayerBackwardArgs& args) {
  return sonicmoe::moe_layer_backward_workspace(call.context(), args.options, shape,
                                                args.workspace_limit, args.step);
}

inline void run(const Call& call, const sonicmoe::MoEBackwardArgs& args) {
  sonicmoe::moe_backward(call.context(), args);
}
inline void run(const Call& call, const sonicmoe::MoELayerBackwardArgs& args) {
  sonicmoe::moe_layer_backward(call.context(), args);
}

/// With a workspace of its own.
template <class BackwardArgs>
void run_step(const Views& views, const Call& call, const Tensor& like,
              const sonicmoe::MoEShape& shape, BackwardArgs args, sonicmoe::BackwardStep step) {
  args.step = step;
  const auto plan = views.ask([&] { return backward_plan(call, shape, args); });
  const Tensor workspace = new_workspace(like, plan.bytes, args.workspace_limit.has_value());
  args.workspace = views.out("workspace", workspace);
  run(call, args);
}

/// The step kUp, if one of the two is needed: dW1 and db1. They are allocated here, that is after
/// kInput, when its dX~ is gone.
template <class BackwardArgs>
std::tuple<Tensor, Tensor> run_up(const Views& views, const Call& call, const Tensor& like,
                                  const sonicmoe::MoEShape& shape, BackwardArgs args,
                                  Gradients& gradients, const Tensor& w1,
                                  const OptionalTensor& b1) {
  const Gradient grad_w1 = gradients.of_weight("grad_w1", w1);
  const Gradient grad_b1 = gradients.of_bias("grad_b1", b1);
  args.grad_w1 = grad_w1.view;
  args.grad_b1 = grad_b1.view;
  if (args.grad_w1.defined() || args.grad_b1.defined()) {
    run_step(views, call, like, shape, args, sonicmoe::BackwardStep::kUp);
  }
  return {grad_w1.tensor, grad_b1.tensor};
}

}  // namespace sonicmoe_torch
