// SONICMOE_LOG=dispatch prints to stderr which backend serves each call and why.
#pragma once

#include <string>
#include <string_view>

namespace sonicmoe {

bool log_dispatch_enabled();
void log_dispatch(std::string_view operation, const std::string& message);

}  // namespace sonicmoe
