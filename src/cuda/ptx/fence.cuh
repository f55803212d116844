// Fences between the proxies and the compiler fence around accumulators. fence_mbarrier_init() is
// in mbarrier.cuh, the wgmma fences are in wgmma.cuh.
#pragma once

#include "cuda/ptx/common.cuh"

namespace sonicmoe::ptx {

// Orders this thread's generic-proxy accesses to shared memory (st, stmatrix, cp.async) before
// async proxy accesses (wgmma operands, bulk copies) that a later barrier releases. Executed by
// each writer, before it arrives.
SONICMOE_DEVICE void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace sonicmoe::ptx
