// What lets one source compute on the host and on the GPU. Compiles without CUDA.
#pragma once

#include <cstdint>

/// A function of both, always inlined: the CPU's loops vectorise in each of their instruction sets
/// only where nothing is left to call.
#if defined(__CUDACC__)
#define SONICMOE_HD __host__ __device__ __forceinline__
#else
#define SONICMOE_HD __attribute__((always_inline)) inline
#endif

/// Before a template that calls a function which it is given: that may be of either side.
#if defined(__CUDACC__)
#define SONICMOE_HD_CALLS _Pragma("nv_exec_check_disable")
#else
#define SONICMOE_HD_CALLS
#endif

namespace sonicmoe {

// std::bit_cast, which is a function of the host alone.
SONICMOE_HD std::uint32_t bits_of(float value) { return __builtin_bit_cast(std::uint32_t, value); }
SONICMOE_HD float float_of(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }

}  // namespace sonicmoe
