// The router's bias [E], bf16 or float32 or absent.
#pragma once

#include <cuda_bf16.h>

#include "sonicmoe/tensor.hpp"

namespace sonicmoe::cuda::router {

struct RouterBias {
  const void* data = nullptr;
  bool is_bf16 = false;

  RouterBias() = default;

  explicit RouterBias(const ConstTensorView& bias)
      : data(bias.data()), is_bf16(bias.defined() && bias.dtype() == DType::kBFloat16) {}

  __device__ float operator[](std::int64_t e) const {
    if (data == nullptr) return 0.0f;
    return is_bf16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(data)[e])
                   : static_cast<const float*>(data)[e];
  }
};

}  // namespace sonicmoe::cuda::router
