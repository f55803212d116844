// What ranks tell each other through memory: accesses at system scope, and the clock that a wait is
// measured by. Addresses may be of another GPU's memory or of the host's.
#pragma once

#include "cuda/ptx/common.cuh"

namespace sonicmoe::ptx {

// The value at `address`; what its writer's release came after is visible to this thread from here
// on, and to the kernels behind it in its stream.
SONICMOE_DEVICE uint64_t load_acquire_system(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

// Publishes what this thread wrote or knows to be written, among it what earlier kernels of its
// stream wrote, and then `value`.
SONICMOE_DEVICE void store_release_system(uint64_t* address, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}
SONICMOE_DEVICE void store_release_system(uint32_t* address, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// Whole words, in no order: a release or an acquire beside them orders them.
SONICMOE_DEVICE uint64_t load_relaxed_system(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}
SONICMOE_DEVICE void store_relaxed_system(uint64_t* address, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

// Orders this thread's accesses, and what it has seen, for all GPUs and the host.
SONICMOE_DEVICE void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// Nanoseconds of a clock that all of the GPU shares; its steps may be a microsecond.
SONICMOE_DEVICE uint64_t global_nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
  return time;
}

}  // namespace sonicmoe::ptx
