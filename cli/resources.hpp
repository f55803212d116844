// What this process may use of the machine.
#pragma once

#include <cstddef>

namespace sonicmoe::cli {

/// Bytes of memory: the machine's, or less where a limit (ulimit, a container) says so. 0 where
/// nothing is known.
std::size_t usable_host_memory();

/// Threads of a call that names no number.
int default_threads();

/// Starts `count` threads and lets them end: OpenMP ends the process when it cannot.
/// Errors: std::runtime_error with the number that could be started.
void require_threads(int count);

}  // namespace sonicmoe::cli
