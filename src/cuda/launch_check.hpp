// Turning a CUDA status into an Error that names the call and, where there is one, the shape.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "sonicmoe/error.hpp"
#include "sonicmoe/moe.hpp"

namespace sonicmoe::cuda {

/// Throws unless `status` is success: OutOfMemory where CUDA lacks memory, else Error with `detail`
/// at its end.
inline void check_cuda(cudaError_t status, const std::string& what,
                       const std::string& detail = {}) {
  if (status == cudaSuccess) return;
  if (status == cudaErrorMemoryAllocation) throw OutOfMemory(what);
  throw Error(what + ": " + cudaGetErrorString(status) + detail);
}

inline void check_launch(cudaError_t status, const std::string& what, const MoEShape& shape) {
  if (status == cudaSuccess) return;
  check_cuda(
      status, what,
      " (T=" + std::to_string(shape.num_tokens) + ", d=" + std::to_string(shape.hidden_size) +
          ", n=" + std::to_string(shape.intermediate_size) +
          ", E=" + std::to_string(shape.num_experts) + ", P=" + std::to_string(shape.num_pairs) +
          ", C=" + std::to_string(shape.row_capacity()) + ")");
}

}  // namespace sonicmoe::cuda
