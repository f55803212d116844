// A backward in its four steps.
#pragma once

#include <array>

#include "sonicmoe/moe_layer.hpp"

namespace sonicmoe::rig {

/// In the order in which they are called.
inline constexpr std::array kBackwardSteps = {BackwardStep::kHidden, BackwardStep::kDown,
                                              BackwardStep::kInput, BackwardStep::kUp};

/// The arguments of one step, from those of all: with every gradient that is wanted and what the
/// steps hand on. The workspace is left for the caller to set.
MoEBackwardArgs of_step(MoEBackwardArgs args, BackwardStep step);
MoELayerBackwardArgs of_step(MoELayerBackwardArgs args, BackwardStep step);

}  // namespace sonicmoe::rig
