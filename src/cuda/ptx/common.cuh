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

}  // namespace sonicmoe::ptx
