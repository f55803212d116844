// Turning a CUDA status into an Error that names the call and the shape.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "sonicmoe/error.hpp"
#include "sonicmoe/moe.hpp"

namespace sonicmoe::cuda {

inline void check_launch(cudaError_t status, const std::string& what, const MoEShape& shape) {
  if (status == cudaSuccess) return;
  throw Error(what + ": " + cudaGetErrorString(status) + " (T=" + std::to_string(shape.num_tokens) +
              ", d=" + std::to_string(shape.hidden_size) + ", n=" +
              std::to_string(shape.intermediate_size) + ", E=" + std::to_string(shape.num_experts) +
              ", P=" + std::to_string(shape.num_pairs) + ")");
}

}  // namespace sonicmoe::cuda
