// The tensor-core kernel of the router's logits.
#pragma once

#include <cuda_runtime_api.h>

#include "sonicmoe/tensor.hpp"

namespace sonicmoe::cuda::router {

/// Whether x and Wr are bf16 with rows that start at multiples of 16 bytes.
bool tensor_core_logits_fit(const ConstTensorView& x, const ConstTensorView& weight);

/// logits [T, E] = x [T, d] weight [E, d]^T + bias; see router_logits. T >= 1.
void launch_tensor_core_logits(cudaStream_t stream, int device, const ConstTensorView& x,
                               const ConstTensorView& weight, const ConstTensorView& bias,
                               const TensorView& logits);

}  // namespace sonicmoe::cuda::router
