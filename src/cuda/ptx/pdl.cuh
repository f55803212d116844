// Programmatic dependent launch. Both are no-ops in a launch without the attribute.
#pragma once

#include "cuda/ptx/common.cuh"

namespace sonicmoe::ptx {

// Waits until the kernels this one depends on have finished and their writes are visible. Before
// the first access to anything an earlier kernel wrote or still reads, in every role.
SONICMOE_DEVICE void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the dependent kernel start its prologue; it still waits for this grid's end before its data.
SONICMOE_DEVICE void grid_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace sonicmoe::ptx
