// What every launcher of the router needs: the stream, the launch check, grid sizes.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "core/integers.hpp"
#include "cuda/device.hpp"
#include "cuda/launch_check.hpp"
#include "sonicmoe/context.hpp"

namespace sonicmoe::cuda::router {

inline cudaStream_t stream_of(const Context& context) {
  return static_cast<cudaStream_t>(context.stream.handle);
}

/// After a launch: what the launch itself was refused for.
inline void check_launch(const char* operation) { check_cuda(cudaGetLastError(), operation); }

/// Blocks of a grid-stride loop over `count` items: enough to fill the GPU, at most 8 per SM.
inline unsigned grid_stride_blocks(std::int64_t count, std::int64_t per_block) {
  return static_cast<unsigned>(std::clamp<std::int64_t>(ceil_div(count, per_block), 1,
                                                        std::int64_t{8} * kPlannedProcessors));
}

}  // namespace sonicmoe::cuda::router
