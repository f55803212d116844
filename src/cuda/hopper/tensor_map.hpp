// Tensor maps: how the copy engine walks a bf16 tensor in boxes.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <initializer_list>

namespace sonicmoe::cuda::hopper {

/// Encodes a map. `sizes` innermost first, in elements; `strides` of the dimensions after the
/// innermost (whose stride is 1), in elements, multiples of 8; `box` likewise, box[0] = 64 with
/// the 128-byte swizzle, at most 256 without one.
/// `data` 16-byte aligned. What lies outside arrives as zeros. Throws Error with the driver's
/// code and the sizes. Host work of well under a microsecond, so that maps are made afresh for
/// every launch: weights may move between steps.
CUtensorMap make_tensor_map(const void* data, std::initializer_list<std::int64_t> sizes,
                            std::initializer_list<std::int64_t> strides,
                            std::initializer_list<int> box,
                            CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B);

}  // namespace sonicmoe::cuda::hopper
