// cp.async: per-thread 16-byte copies from global to shared memory. They write through the generic
// proxy: before wgmma reads the bytes, the writer needs fence_proxy_async_shared() (fence.cuh).
#pragma once

#include "cuda/ptx/common.cuh"

namespace sonicmoe::ptx {

// Bytes around a missing 16 that L2 fetches from memory at once.
enum class Fetch { k128, k256 };

// Copies `source_bytes` (0..16) bytes and zero-fills the rest of the 16. Both addresses 16-byte
// aligned; `source` must be a valid address even when source_bytes is 0. Bypasses L1.
template <Fetch kFetch = Fetch::k128>
SONICMOE_DEVICE void cp_async_16(uint32_t destination, const void* source, uint32_t source_bytes) {
  if constexpr (kFetch == Fetch::k128) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination),
                 "l"(source), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(destination),
                 "l"(source), "r"(source_bytes)
                 : "memory");
  }
}

// The same without the zero-fill operand: always 16 bytes.
template <Fetch kFetch = Fetch::k128>
SONICMOE_DEVICE void cp_async_16(uint32_t destination, const void* source) {
  if constexpr (kFetch == Fetch::k128) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(destination),
                 "l"(source)
                 : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(destination),
                 "l"(source)
                 : "memory");
  }
}

// Closes this thread's group of copies since the last commit (possibly empty).
SONICMOE_DEVICE void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's groups are unfinished.
template <int kPending>
SONICMOE_DEVICE void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Arrives at the barrier once all earlier copies of this thread have landed. The arrival counts
// against the barrier's count (noinc), so initialise it with one arrival per issuing thread.
SONICMOE_DEVICE void cp_async_mbarrier_arrive_noinc(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

}  // namespace sonicmoe::ptx
