// Thread block clusters: rank and the cluster barrier.
#pragma once

#include "cuda/ptx/common.cuh"

namespace sonicmoe::ptx {

// This CTA's rank in its cluster; 0 without a cluster.
SONICMOE_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// First half of the cluster barrier, release. Every thread of the cluster arrives; warps converged.
SONICMOE_DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// Second half, acquire.
SONICMOE_DEVICE void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

}  // namespace sonicmoe::ptx
