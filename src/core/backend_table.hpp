// The backends of this build, and what it lacks. The list is in src/CMakeLists.txt.
#pragma once

#include <memory>
#include <span>
#include <string_view>

#include "core/backend.hpp"

namespace sonicmoe {

struct BackendEntry {
  std::string_view name;
  std::unique_ptr<Backend> (*make)();  ///< null where this build lacks it
  std::string_view absent;             ///< why, then
};

/// In order of preference.
std::span<const BackendEntry> backend_table();

}  // namespace sonicmoe
