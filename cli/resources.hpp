// What this process may use of the machine.
#pragma once

#include <cstddef>

#include "sonicmoe/device.hpp"

namespace sonicmoe::cli {

/// Bytes of memory: what the machine has left, or less where a limit (ulimit, a container) says so.
/// 0 where nothing is known.
std::size_t usable_host_memory();

/// To be called before operations run, after their large tensors are made: oneDNN generates code
/// when it is first used, and OpenMP starts threads, and neither survives without memory. Errors:
/// std::bad_alloc where 64 MiB cannot be had any more.
void require_headroom();

/// Threads of a call that names no number.
int default_threads();

/// Starts `count` threads, asks for the headroom beside them, and lets them end: OpenMP ends the
/// process when it cannot have them.
/// Errors: std::bad_alloc; std::runtime_error with the number that could be started.
void require_threads(int count);

inline bool on_host(Device device) noexcept { return device.type == DeviceType::kCpu; }

/// Memory of a device of devices() that this process may use, 0 where it is not known.
std::size_t memory_bytes_of(Device device);

}  // namespace sonicmoe::cli
