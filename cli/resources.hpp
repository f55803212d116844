// What this process may use of the machine.
#pragma once

namespace sonicmoe::cli {

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

}  // namespace sonicmoe::cli
