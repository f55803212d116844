// Stands in for the header of that name where epilogues run on the host (epilogue_test.cpp): what
// the compiler for the GPU defines by itself. A lane runs alone: a shuffle returns its own value, a
// sum over lanes is its own share.
#pragma once

#include <cuda_bf16.h>

#include <algorithm>

#define __device__
#define __host__
#define __forceinline__ inline
#define SONICMOE_DEVICE inline

using std::max;
using std::min;

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __shfl_sync(unsigned, T value, int) {
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned, T, int) {
  return T{};
}
inline void __syncwarp() {}
