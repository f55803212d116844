// setmaxnreg: moves registers between the warpgroups of a CTA. All four warps of the warpgroup
// execute it, converged. kRegisters is a multiple of 8 in [24, 256]. The sum over the warpgroups
// must not exceed what the launch allocated, or the increase waits for ever.
#pragma once

#include "cuda/ptx/common.cuh"

namespace sonicmoe::ptx {

// Raises this warpgroup's register count; waits until another warpgroup has released enough.
template <int kRegisters>
SONICMOE_DEVICE void setmaxnreg_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Lowers it and releases the difference.
template <int kRegisters>
SONICMOE_DEVICE void setmaxnreg_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace sonicmoe::ptx
