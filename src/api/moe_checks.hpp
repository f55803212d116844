// Checks that moe_layer shares with moe.
#pragma once

#include "core/check.hpp"
#include "sonicmoe/moe.hpp"

namespace sonicmoe {

/// Everything moe_backward checks except the workspace.
MoEShape check_moe_backward(const Check& check, const MoEBackwardArgs& args);

}  // namespace sonicmoe
