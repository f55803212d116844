// The element of the products' operands and results in memory. Kernels, tensor maps and scratch
// take its size from here.
#pragma once

#include <cuda_bf16.h>

#include <cstddef>

namespace sonicmoe::cuda {

using bf16 = __nv_bfloat16;

inline constexpr int kElementBytes = sizeof(bf16);
inline constexpr int kVectorElements = 16 / kElementBytes;  ///< of one 16-byte access

}  // namespace sonicmoe::cuda
