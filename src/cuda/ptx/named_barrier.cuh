// Hardware barriers 1..15 among a subset of the CTA's warps (0 is __syncthreads). `threads` counts
// all participants, arriving and waiting, and is a multiple of 32.
#pragma once

#include "cuda/ptx/common.cuh"

namespace sonicmoe::ptx {

// Arrives and waits for the others.
SONICMOE_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace sonicmoe::ptx
