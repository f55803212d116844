// What every PTX wrapper shares. Each function in this folder issues one instruction (plus, where
// the instruction needs it, the predicate or the address conversion around it) and states its
// contract.
#pragma once

#include <cstdint>

#define SONICMOE_DEVICE __device__ __forceinline__

namespace sonicmoe::ptx {

// The 32-bit address in the shared::cta window that the wrappers below take. `pointer` must point
// to shared memory of this CTA.
SONICMOE_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// One lane of a converged warp, the same on each call; cheaper for the compiler than `lane == 0`,
// which it cannot prove uniform.
SONICMOE_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
}

}  // namespace sonicmoe::ptx
