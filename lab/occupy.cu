// What stands in for a collective on one GPU: `ctas` CTAs of 640 threads, each with all the shared
// memory of its multiprocessor, copy `bytes` bytes. bench/shared.py loads it as a library (lab
// M19).
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 640;
constexpr int kSharedBytes = 227 * 1024;

__global__ void __launch_bounds__(kThreads)
    occupy_kernel(const uint4* __restrict__ from, uint4* __restrict__ to, std::int64_t count) {
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
    to[i] = from[i];
  }
}

}  // namespace

/// Copies on `stream`; the CUDA error code. `bytes` is a multiple of 16.
extern "C" int occupy(int ctas, const void* from, void* to, std::int64_t bytes, void* stream) {
  const cudaError_t status = cudaFuncSetAttribute(
      occupy_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  occupy_kernel<<<ctas, kThreads, kSharedBytes, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint4*>(from), static_cast<uint4*>(to), bytes / 16);
  return cudaGetLastError();
}
