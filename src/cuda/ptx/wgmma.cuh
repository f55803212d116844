// wgmma: asynchronous matrix products of a warpgroup, bf16 operands in shared memory, fp32
// accumulators in registers. Thread t of the warpgroup holds, in d[4b + 2h + i], row
// 16*(t/32) + (t%32)/4 + 8h and column 8b + 2*(t%4) + i of the 64 x N product.
#pragma once

#include "cuda/ptx/common.cuh"
#include "cuda/ptx/major.hpp"

namespace sonicmoe::ptx {

// Orders register accesses before the wgmma that follow. Before the first wgmma of a group whenever
// other instructions touched the accumulators.
SONICMOE_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the warpgroup's current group of wgmma.
SONICMOE_DEVICE void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending groups are unfinished. It proves only the executing warp's share
// done: release a stage with one arrival per warp, not per warpgroup.
template <int kPending>
SONICMOE_DEVICE void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses to the accumulators across this point, while wgmma own
// them; without it ptxas may serialise the group (C7510).
template <int kCount>
SONICMOE_DEVICE void fence_accumulators(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Wgmma<N, A, B>::mma(d, a, b, accumulate): d = A·B (+ d when accumulate), 64 x N x 16, with matrix
// descriptors a and b (hopper/tile/swizzle.cuh). Asynchronous: read d only after wgmma_wait_group.
template <int kN, Major kMajorA, Major kMajorB>
struct Wgmma;

#include "cuda/ptx/wgmma_bf16.inc.cuh"

}  // namespace sonicmoe::ptx
