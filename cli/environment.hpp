// The environment variables that the library reads.
#pragma once

#include <optional>
#include <string>

namespace sonicmoe::cli {

/// Empty is the same as unset, as everywhere in the shell.
std::optional<std::string> environment_variable(const char* name);

/// Errors: a variable with a value that the library would take for its default. SONICMOE_BACKEND is
/// checked with --backend.
void check_environment();

}  // namespace sonicmoe::cli
