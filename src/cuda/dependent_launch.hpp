// Programmatic dependent launch from the host; ptx/pdl.cuh has the kernels' side.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <utility>

namespace sonicmoe::cuda {

/// Launches a kernel whose CTAs may start before the kernel in front of it in the stream has ended.
/// Each of its threads calls ptx::grid_dependency_wait() before it touches memory.
template <class... Parameters, class... Args>
cudaError_t launch_dependent(void (*kernel)(Parameters...), unsigned grid, unsigned threads,
                             std::size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

}  // namespace sonicmoe::cuda
