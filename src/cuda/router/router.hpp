// The router on a Hopper GPU: the router half of Backend, one function for one method, plus the
// router's share of dX. Arguments are validated by src/api/; see sonicmoe/router.hpp and
// core/backend.hpp for the contracts.
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

#include "core/backend.hpp"
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
void add_logits_gradient(const Context& context, TensorView grad_logits, ConstTensorView addend);

void router_logits(const Context& context, ConstTensorView x, ConstTensorView weight,
                   ConstTensorView bias, TensorView logits, TensorView workspace);
void router_logits_backward(const Context& context, ConstTensorView x, ConstTensorView grad_logits,
                            TensorView grad_weight, TensorView grad_bias, bool accumulate,
                            TensorView workspace);
std::size_t router_logits_workspace_bytes(const Context& context, const MoEShape& shape);

/// dlogits of a layer's backward pass, whose rows `metadata` lists. Where both products take it as
/// terms (gradient_gemm.hpp), it is written as such straight away, router.grad_logits says so and
/// `terms` are ready for logits_grad_input() into slabs of `num_columns` of grad_x; else as
/// router.compute_grad_logits() does.
void layer_grad_logits(cudaStream_t stream, const Metadata& metadata, ConstTensorView x,
                       std::int64_t num_columns, Matrix grad_x, const GradientTerms& terms,
                       RouterShare& router);

/// out [T, num_columns] bfloat16 = grad_logits [T, E] router_weight [E, d], the columns
/// from `first_column` on: rounded as the rows of dX~ it is added to. num_columns % 8 == 0. `terms`
/// from carve_share_terms().
void logits_grad_input(cudaStream_t stream, int device, ConstTensorView grad_logits,
                       ConstTensorView router_weight, std::int64_t first_column,
                       std::int64_t num_columns, Matrix out, const GradientTerms& terms);

}  // namespace sonicmoe::cuda::router
