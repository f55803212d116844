// Random wrong arguments, see fuzz_main.cpp.
#pragma once

#include <cstdint>

namespace sonicmoe::rig {

/// Attacks `first` to `first + count`: operation, shape, argument and attack follow from the
/// number. Returns the exit code.
int fuzz_arguments(std::uint64_t first, std::uint64_t count);

}  // namespace sonicmoe::rig
