#include <cstdint>

#include "rig/poison_shared.hpp"

namespace sonicmoe::rig {
namespace {

constexpr int kThreads = 512;

// A CTA takes all shared memory of its multiprocessor and stays for a while, so that the CTAs
// spread over all of them.
__global__ void poison_kernel(int words) {
  extern __shared__ uint32_t shared[];
  const long long start = clock64();
  for (int i = threadIdx.x; i < words; i += kThreads) {
    static_cast<volatile uint32_t*>(shared)[i] = 0xfff5fff5u;
  }
  while (clock64() - start < 20000) {
  }
}

}  // namespace

cudaError_t launch_poison_shared() {
  int device = 0, processors = 0, bytes = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (status == cudaSuccess) {
    status =
        cudaFuncSetAttribute(poison_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  }
  if (status != cudaSuccess) return status;
  poison_kernel<<<4 * processors, kThreads, bytes>>>(bytes / 4);
  return cudaGetLastError();
}

}  // namespace sonicmoe::rig
