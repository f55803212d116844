// Warp-level matrix products on the tensor cores (mma.sync), and the loads of their operands from
// shared memory (ldmatrix). Fragment layouts as in the PTX manual, "Matrix fragments for
// mma.m16n8k16 with floating point type".
#pragma once

#include "cuda/ptx/common.cuh"

namespace sonicmoe::ptx {

// Four 8x8 matrices of 16-bit elements: lane l gives the 16-byte aligned address of row l % 8 of
// matrix l / 8; register i receives elements (row l / 4, columns 2 (l % 4) + {0, 1}) of matrix i.
SONICMOE_DEVICE void load_matrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same, each matrix transposed.
SONICMOE_DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// D [16, 8] += A [16, 16] B [16, 8], bf16 operands, float32 accumulators.
SONICMOE_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace sonicmoe::ptx
