// Vector loads, stores and reductions, and L2 eviction policies. Addresses are aligned to the
// access.
#pragma once

#include "cuda/ptx/common.cuh"

namespace sonicmoe::ptx {

// 16 bytes from shared memory.
SONICMOE_DEVICE uint4 load_shared_v4(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// Nothing that follows begins before `value`, which a load may still bring, is in its register.
// (The pause of no length, for one value of 2^32, is what the compiler cannot take away.)
SONICMOE_DEVICE void await_value(uint32_t value) {
  asm volatile(
      "{\n"
      ".reg .pred is_rare;\n"
      "setp.eq.u32 is_rare, %0, 0x9e3779b9;\n"
      "@is_rare nanosleep.u32 0;\n"
      "}" ::"r"(value)
      : "memory");
}

// 8 bytes.
SONICMOE_DEVICE uint2 load_shared_v2(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}

// 16 bytes to shared memory.
SONICMOE_DEVICE void store_shared_v4(uint32_t address, const uint4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// 16 bytes of data no kernel writes meanwhile, read once: not kept in L1. Volatile, so that a batch
// of loads stays a batch: the compiler would otherwise sink each load to its use.
SONICMOE_DEVICE uint4 load_global_nc_v4(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// 16 bytes, once, that this thread may write later. Volatile as above.
SONICMOE_DEVICE uint4 load_global_v4(const void* address) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// Asks L2 for the line at a global address.
SONICMOE_DEVICE void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// 16 bytes to global memory.
SONICMOE_DEVICE void store_global_v4(void* address, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// 8 bytes to global memory.
SONICMOE_DEVICE void store_global_v2(void* address, uint32_t x, uint32_t y) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(x), "r"(y) : "memory");
}

// store_global_v4 for data this kernel does not read again (evict first).
SONICMOE_DEVICE void store_global_streaming_v4(void* address, const uint4& v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// Adds 8 bf16 values at 16-byte aligned `address`, each sum rounded to bf16, in unspecified order
// among concurrent adds. Relaxed, GPU scope.
SONICMOE_DEVICE void reduce_add_bf16x2_v4(void* address, const uint4& v) {
  asm volatile("red.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

}  // namespace sonicmoe::ptx
