#pragma once

#include <string_view>

#include "sonicmoe/export.hpp"

#define SONICMOE_VERSION_MAJOR 0
#define SONICMOE_VERSION_MINOR 1
#define SONICMOE_VERSION_PATCH 0

namespace sonicmoe {

/// "major.minor.patch" of the library that was linked (not of the headers).
SONICMOE_API std::string_view version() noexcept;

}  // namespace sonicmoe
