// moe_layer's backward on CUDA: the router's steps between those of the experts.
#pragma once

#include "core/plan.hpp"
#include "sonicmoe/moe_layer.hpp"

namespace sonicmoe::cuda {

void layer_backward(const Context& context, const LayerPlan& plan,
                    const MoELayerBackwardArgs& args);

}  // namespace sonicmoe::cuda
