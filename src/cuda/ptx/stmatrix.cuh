// stmatrix: a warp writes four 8x8 blocks of 16-bit values from the mma fragment layout. The bytes
// go through the generic proxy.
#pragma once

#include "cuda/ptx/common.cuh"

namespace sonicmoe::ptx {

// Lane 8*i + j gives the 16-byte aligned address of row j of block i; register i of lane 4*r + c
// holds row r, columns 2c and 2c+1 of block i.
SONICMOE_DEVICE void stmatrix_x4(uint32_t row_address, uint32_t r0, uint32_t r1, uint32_t r2,
                                 uint32_t r3) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address),
      "r"(r0), "r"(r1), "r"(r2), "r"(r3)
      : "memory");
}

// The same, each block transposed on the way: row j of block i in memory is column j of the
// fragment.
SONICMOE_DEVICE void stmatrix_x4_trans(uint32_t row_address, uint32_t r0, uint32_t r1, uint32_t r2,
                                       uint32_t r3) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address),
      "r"(r0), "r"(r1), "r"(r2), "r"(r3)
      : "memory");
}

}  // namespace sonicmoe::ptx
