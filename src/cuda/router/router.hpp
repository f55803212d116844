// The router on a Hopper GPU: the router half of ComposedBackend, one function for one method, and
// the router's part in a layer's backward. Arguments are validated by src/api/; see
// sonicmoe/router.hpp and layer/composed_backend.hpp for the contracts.
//
// Everything runs on the context's stream. Nothing allocates, synchronises or reads device data on
// the host, so every function can be captured in a graph; the device must be current. Results are
// the same bits run after run: floats are never added by atomics.
//
// Selection, token rounding and all scores work in float64 inside a token, as the host's do, so
// ids agree with the host's wherever its own float64 results decide them, and round_select agrees
// bit for bit. Limit: the experts of one token have to fit in shared memory (about 18000 experts).
#pragma once

#include <cuda_runtime_api.h>

#include "core/metadata.hpp"
#include "cuda/router/gradient_gemm.hpp"
#include "sonicmoe/moe.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe::cuda::router {

void route_forward(const Context& context, const RouteForwardArgs& args);
/// Ids outside 0..E-1 are skipped (the host refuses them).
void route_backward(const Context& context, const RouteBackwardArgs& args);

std::size_t round_tokens_workspace_bytes(const Context& context, std::int64_t num_tokens,
                                         std::int64_t num_experts, std::int64_t top_k);
void round_tokens_forward(const Context& context, const RoundTokensForwardArgs& args);
void round_select(const Context& context, const RoundSelectArgs& args);
/// The pair list holds a (token, expert) at most once, as round_tokens_forward's does.
void round_tokens_backward(const Context& context, const RoundTokensBackwardArgs& args);

void load_balancing_loss_forward(const Context& context, Scoring scoring, std::int64_t top_k,
                                 ConstTensorView logits, ConstTensorView rows_per_expert,
                                 TensorView loss);
void load_balancing_loss_backward(const Context& context, Scoring scoring, std::int64_t top_k,
                                  ConstTensorView logits, ConstTensorView rows_per_expert,
                                  ConstTensorView grad_loss, TensorView grad_logits);
void router_z_loss_forward(const Context& context, ConstTensorView logits, TensorView loss);
void router_z_loss_backward(const Context& context, ConstTensorView logits,
                            ConstTensorView grad_loss, TensorView grad_logits);
void update_expert_bias(const Context& context, TensorView bias, ConstTensorView rows_per_expert,
                        float rate);

// --------------------------------------------------------------------------------- layer's
// products

void router_logits(const Context& context, ConstTensorView x, ConstTensorView weight,
                   ConstTensorView bias, TensorView logits);

/// Scratch of the layer's backward: of router_logits_backward(), and the terms of router_grad_x().
std::size_t router_logits_backward_workspace_bytes(int device, const MoEShape& shape);
GradientTerms router_grad_x_terms(void* workspace, int device, const MoEShape& shape);

void router_logits_backward(const Context& context, ConstTensorView x,
                            const LogitsGradient& grad_logits, TensorView grad_weight,
                            TensorView grad_bias, bool accumulate, void* workspace);

/// out [T, num_columns] bfloat16 = grad_logits [T, E] router_weight [E, d], the columns
/// from `first_column` on: rounded as the rows of dX~ it is added to. num_columns % 8 == 0. `terms`
/// from router_grad_x_terms().
void router_grad_x(const Context& context, const LogitsGradient& grad_logits,
                   ConstTensorView router_weight, std::int64_t first_column,
                   std::int64_t num_columns, Matrix out, const GradientTerms& terms);

/// args.grad_logits = the gradient of the logits + addend [T, E] (float32 or absent), split into
/// its terms as both products take it (products_take_terms()); and `terms` for router_grad_x().
/// False, and nothing enqueued, where the kernel declines: other weights than renormalised ones, E
/// or K too large.
bool split_route_backward(cudaStream_t stream, const RouteBackwardArgs& args,
                          ConstTensorView addend, const GradientTerms& terms);
/// The rows of args.token_ids are found through `metadata`.
bool split_round_tokens_backward(cudaStream_t stream, const RoundTokensBackwardArgs& args,
                                 const Metadata& metadata, ConstTensorView addend,
                                 const GradientTerms& terms);

/// grad_logits += addend, both [T, E] float32 contiguous.
void add_logits_gradient(const Context& context, TensorView grad_logits, ConstTensorView addend);

}  // namespace sonicmoe::cuda::router
