// Instructions that only the experiments use, one per function, as in src/cuda/ptx.
#pragma once

#include "cuda/ptx/common.cuh"

namespace experiment::ptx_extra {

// True in one lane of a converged warp, the same one for uniform operands.
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

// 4 bytes of shared memory.
SONICMOE_DEVICE uint32_t load_shared(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

SONICMOE_DEVICE void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// Adds four floats to global memory, in any order among threads.
SONICMOE_DEVICE void reduce_add_f32_v4(void* address, const float4& v) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(v.x), "f"(v.y),
               "f"(v.z), "f"(v.w)
               : "memory");
}

// Adds `bytes` of bf16 from shared memory to global memory, in this thread's bulk group.
SONICMOE_DEVICE void bulk_reduce_add_bf16(void* destination, uint32_t source, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16 [%0], [%1], %2;" ::"l"(
          destination),
      "r"(source), "r"(bytes)
      : "memory");
}

SONICMOE_DEVICE void bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all of this thread's bulk groups are written to memory.
SONICMOE_DEVICE void bulk_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

}  // namespace experiment::ptx_extra
