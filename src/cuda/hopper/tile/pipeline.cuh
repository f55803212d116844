// Ring buffer state and checked waits. A wait that never ends is the usual failure of these
// kernels: built with SONICMOE_WAIT_LIMIT it traps after that many clocks and says who waited for
// what. Built with SONICMOE_STRESS (tests only) warps wait a random time after waits and shared
// memory starts as NaN, so that a missing wait or a read of what nobody wrote shows in the results.
#pragma once

#include <cstdint>

#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/mbarrier.cuh"

namespace sonicmoe::tile {

// Who waits, for the report of a wait that does not end.
enum class Role : uint32_t { kLoader, kMath, kEpilogue };
enum class Slot : uint32_t {
  kFull,
  kEmpty,
  kDumpFull,
  kDumpEmpty,
  kItemFull,
  kItemEmpty,
  kHidden,
  kStart
};

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

#ifdef SONICMOE_STRESS
// In every CTA one role is the slow one, another one each 2^17 ns. Its warps pause after every
// fourth wait for up to 4096 clocks, each warp by itself. Called by whole warps.
SONICMOE_DEVICE void dawdle(Role role, Slot slot, uint32_t stage) {
  const auto mix = [](uint32_t v) {
    v = (v ^ (v >> 16)) * 0x7feb352du;
    v = (v ^ (v >> 15)) * 0x846ca68bu;
    return v ^ (v >> 16);
  };
  uint64_t time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
  const uint32_t start = clock();
  const uint32_t slow = mix(blockIdx.x * 0x9e3779b9u + static_cast<uint32_t>(time >> 17)) % 3;
  uint32_t draw = mix(start ^ (threadIdx.x / 32) << 24 ^ static_cast<uint32_t>(slot) << 20 ^ stage);
  // Equal for all lanes: what follows a wait may need the whole warp.
  draw = __shfl_sync(~0u, slow == static_cast<uint32_t>(role) ? draw : 1u, 0);
  if (draw % 4 != 0) return;
  while (static_cast<uint32_t>(clock()) - start < draw >> 20) {
  }
  __syncwarp();
}
#endif

// SONICMOE_STRESS: a random pause where a hand-over goes without wait(). Called by whole warps.
SONICMOE_DEVICE void pause([[maybe_unused]] Role role, [[maybe_unused]] Slot slot,
                           [[maybe_unused]] uint32_t stage) {
#ifdef SONICMOE_STRESS
  dawdle(role, slot, stage);
#endif
}

// SONICMOE_STRESS: fills the CTA's shared memory with NaN patterns. All threads; what is written
// next needs no further barrier.
SONICMOE_DEVICE void poison_shared([[maybe_unused]] void* shared, [[maybe_unused]] int bytes) {
#ifdef SONICMOE_STRESS
  for (int i = static_cast<int>(threadIdx.x); i < bytes / 4; i += static_cast<int>(blockDim.x)) {
    static_cast<uint32_t*>(shared)[i] = 0xfff5fff5u;
  }
  ptx::fence_proxy_async_shared();
  __syncthreads();
#endif
}

// Waits for the phase `parity` of `barrier`. The role, slot and stage cost nothing without
// SONICMOE_STRESS or SONICMOE_WAIT_LIMIT.
SONICMOE_DEVICE void wait(uint32_t barrier, uint32_t parity, [[maybe_unused]] Role role,
                          [[maybe_unused]] Slot slot, [[maybe_unused]] uint32_t stage) {
  const auto try_wait = [&] { return ptx::mbarrier_try_wait(barrier, parity); };
#if defined(SONICMOE_STRESS)
  while (!try_wait()) {
  }
  dawdle(role, slot, stage);
#elif defined(SONICMOE_WAIT_LIMIT)
  if (try_wait()) return;
  const uint32_t start = clock();
  while (!try_wait()) {
    if (static_cast<uint32_t>(clock()) - start > SONICMOE_WAIT_LIMIT) {
      fail_wait(role, slot, stage, parity);
    }
  }
#else
  if (try_wait()) return;
  while (!try_wait()) {
  }
#endif
}

}  // namespace sonicmoe::tile
