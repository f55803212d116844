#include "rig/backward_steps.hpp"

namespace sonicmoe::rig {
namespace {

using enum BackwardStep;

// What both kinds of arguments have.
template <class Args>
void keep_tensors_of(Args& args, BackwardStep step) {
  args.step = step;
  args.workspace = {};
  if (step != kHidden && step != kDown) args.grad_out = {};
  if (step != kHidden && step != kDown) args.scaled_a = {};
  if (step == kDown) args.grad_h = {};
  if (step != kDown) args.grad_w2 = args.grad_b2 = {};
  if (step != kInput) args.grad_x = {};
  if (step != kUp) args.grad_w1 = args.grad_b1 = {};
}

}  // namespace

MoEBackwardArgs of_step(MoEBackwardArgs args, BackwardStep step) {
  keep_tensors_of(args, step);
  if (step != kHidden) args.h = {};
  if (step != kHidden) args.grad_routing_weights = {};
  return args;
}

MoELayerBackwardArgs of_step(MoELayerBackwardArgs args, BackwardStep step) {
  keep_tensors_of(args, step);
  if (step != kHidden) args.saved.h = {};
  if (step != kHidden && step != kInput) args.grad_routing_weights = {};
  if (step != kInput) args.grad_logits = {};
  if (step != kInput) args.grad_router_weight = args.grad_router_bias = {};
  return args;
}

}  // namespace sonicmoe::rig
