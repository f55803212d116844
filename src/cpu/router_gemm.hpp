// The router's matrix products on the CPU.
#pragma once

#include "sonicmoe/tensor.hpp"

namespace sonicmoe::cpu {

/// Scratch of any of the three.
std::size_t router_gemm_workspace_bytes(int threads);

/// logits [T, E] = x [T, d] weight [E, d]^T + bias [E].
void router_logits(int threads, const ConstTensorView& x, const ConstTensorView& weight,
                   const ConstTensorView& bias, const TensorView& logits, void* workspace);

/// grad_x [T, d] = grad_logits [T, E] weight [E, d].
void router_grad_x(int threads, const ConstTensorView& grad_logits, const ConstTensorView& weight,
                   const TensorView& grad_x, void* workspace);

/// grad_weight [E, d] (+)= grad_logits^T x, grad_bias [E] (+)= column sums of grad_logits.
void router_logits_backward(int threads, const ConstTensorView& x,
                            const ConstTensorView& grad_logits, const TensorView& grad_weight,
                            const TensorView& grad_bias, bool accumulate, void* workspace);

}  // namespace sonicmoe::cpu
