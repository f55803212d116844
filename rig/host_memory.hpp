// How much memory a run may take.
#pragma once

#include <cstddef>

#include "sonicmoe/device.hpp"

namespace sonicmoe::rig {

/// Bytes of host memory: what the machine has left, or less where a limit (ulimit, a container)
/// says so. 0 where nothing is known.
std::size_t usable_host_memory();

/// The same of a device of devices().
std::size_t usable_memory(Device device);

}  // namespace sonicmoe::rig
