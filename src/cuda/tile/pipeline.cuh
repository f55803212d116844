// Ring buffer state and checked waits. A wait that never ends is the usual failure of these
// kernels: built with SONICMOE_WAIT_LIMIT it traps after that many clocks and says who waited for
// what.
#pragma once

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"

namespace sonicmoe::tile {

// Who waits, for the report of a wait that does not end.
enum class Role : uint32_t { kLoader, kMath, kEpilogue, kConsumer };
enum class Slot : uint32_t { kFull, kEmpty, kDumpFull, kDumpEmpty, kItemFull, kItemEmpty };

// Position in a ring of kStages: index and parity of the current pass. A consumer waits for
// `parity`, a producer for `parity ^ 1` (a fresh barrier lets the first pass through).
template <int kStages>
struct RingState {
  uint32_t stage = 0;
  uint32_t parity = 0;

  SONICMOE_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

#ifdef SONICMOE_WAIT_LIMIT
// Mapped host memory that outlives a trapped context: {1, role, slot, stage, parity, block,
// thread}. Set with cudaMemcpyToSymbol; one per translation unit.
static __device__ uint32_t* wait_report = nullptr;

SONICMOE_DEVICE void fail_wait(Role role, Slot slot, uint32_t stage, uint32_t parity) {
  uint32_t* report = wait_report;
  if (report != nullptr && atomicExch_system(report, 1u) == 0) {
    report[1] = static_cast<uint32_t>(role);
    report[2] = static_cast<uint32_t>(slot);
    report[3] = stage;
    report[4] = parity;
    report[5] = blockIdx.x;
    report[6] = threadIdx.x;
    __threadfence_system();
  }
  __nanosleep(1000000);
  __trap();
}
#endif

// Waits for the phase `parity` of `barrier`. The role, slot and stage cost nothing without
// SONICMOE_WAIT_LIMIT. kPair: the slot was handed back by both CTAs of a cluster.
template <bool kPair = false>
SONICMOE_DEVICE void wait(uint32_t barrier, uint32_t parity, [[maybe_unused]] Role role,
                          [[maybe_unused]] Slot slot, [[maybe_unused]] uint32_t stage) {
  auto try_wait = [&] {
    if constexpr (kPair) {
      return ptx::mbarrier_try_wait_cluster_relaxed(barrier, parity);
    } else {
      return ptx::mbarrier_try_wait(barrier, parity);
    }
  };
  if (try_wait()) return;
#ifdef SONICMOE_WAIT_LIMIT
  const uint32_t start = clock();
  while (!try_wait()) {
    if (static_cast<uint32_t>(clock()) - start > SONICMOE_WAIT_LIMIT) {
      fail_wait(role, slot, stage, parity);
    }
  }
#else
  while (!try_wait()) {
  }
#endif
}

}  // namespace sonicmoe::tile
