// Checks that moe_layer shares with moe and with the router.
#pragma once

#include "core/check.hpp"
#include "sonicmoe/moe.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe {

/// Everything moe_backward checks except the workspace.
MoEShape check_moe_backward(const Check& check, const MoEBackwardArgs& args);

/// Everything route_backward checks.
void check_route_backward(const RouteBackwardArgs& args);
void check_round_tokens_backward(const RoundTokensBackwardArgs& args);

}  // namespace sonicmoe
