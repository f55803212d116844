// One way to run independent tasks on the CPU's threads.
#pragma once

#include <cstdint>
#include <functional>

namespace sonicmoe {

/// Threads a call may use: `requested` if positive, else OpenMP's default.
int thread_count(int requested);

/// Calls task(index, thread) for index in [0, count), thread in [0, threads). Tasks are handed out
/// dynamically, so which thread runs a task is unspecified: a task writes only its own outputs and
/// the scratch of its thread, which is what makes results independent of the thread count.
/// Where the system has no more threads, fewer run.
/// An exception leaves after all threads have stopped (the first one in time).
void parallel_for(int threads, std::int64_t count,
                  const std::function<void(std::int64_t index, int thread)>& task);

}  // namespace sonicmoe
