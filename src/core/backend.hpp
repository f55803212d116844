// The internal contract of a backend and the list that chooses one.
//
// src/api/ validates arguments and calls exactly one method here; a backend may rely on everything
// the public headers promise about shapes, dtypes, strides and alignment.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "core/check.hpp"
#include "sonicmoe/moe.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe {

/// The router's part of a fused layer backward: dX += grad_logits Wr, in the same float32 sum and
/// with the same single rounding as the experts' rows.
struct RouterShare {
  /// Computes grad_logits from grad_routing_weights. The backend calls it once, after it has
  /// produced (or, on a stream, enqueued) all of grad_routing_weights and before it sums dX, unless
  /// it does the same at that point by itself (`topk`, `rounding`).
  std::function<void()> compute_grad_logits;
  /// What it does, so that a backend may do it in another way instead: route_backward(*topk) or
  /// round_tokens_backward(*rounding), then grad_logits += addend where there is one. One is null.
  const RouteBackwardArgs* topk = nullptr;
  const RoundTokensBackwardArgs* rounding = nullptr;
  ConstTensorView addend;  ///< [T, E] float32 contiguous or absent
  /// [T, E] float32 contiguous. A backend may put a view of another form there, in the same memory:
  /// its own router_logits_backward() gets it next.
  ConstTensorView grad_logits;
  ConstTensorView router_weight;  ///< [E, d], dtype of x or float32, unit stride in d
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string_view name() const = 0;
  /// Empty when the backend can run on this machine, else one line that says why not.
  virtual std::string unavailable_reason() const { return {}; }
  /// What it runs on: "oneDNN 2.6.3, AVX2, 2 threads".
  virtual std::string description() const = 0;
  virtual bool serves(DeviceType type) const = 0;

  // Experts. `shape` is moe_shape() of the arguments.
  virtual WorkspacePlan moe_forward_workspace(const Context& context, const MoEShape& shape,
                                              bool inference,
                                              std::optional<std::size_t> limit) const = 0;
  virtual WorkspacePlan moe_backward_workspace(const Context& context, const MoEShape& shape,
                                               std::optional<std::size_t> limit) const = 0;
  /// Throws for arguments that the public headers allow and this backend cannot serve. Called
  /// before anything of an operation runs; the workspace may be absent.
  virtual void check_moe_forward(const Check&, const MoEShape&, const MoEForwardArgs&) const {}
  virtual void check_moe_backward(const Check&, const MoEShape&, const MoEBackwardArgs&) const {}
  virtual void moe_forward(const Context& context, const MoEShape& shape,
                           const MoEForwardArgs& args) const = 0;
  /// `router` is null outside moe_layer_backward.
  virtual void moe_backward(const Context& context, const MoEShape& shape,
                            const MoEBackwardArgs& args, RouterShare* router) const = 0;

  // Router.
  virtual void route_forward(const Context& context, const RouteForwardArgs& args) const = 0;
  virtual void route_backward(const Context& context, const RouteBackwardArgs& args) const = 0;
  virtual std::size_t round_tokens_workspace_bytes(const Context& context, std::int64_t num_tokens,
                                                   std::int64_t num_experts,
                                                   std::int64_t top_k) const = 0;
  virtual void round_tokens_forward(const Context& context,
                                    const RoundTokensForwardArgs& args) const = 0;
  virtual void round_select(const Context& context, const RoundSelectArgs& args) const = 0;
  virtual void round_tokens_backward(const Context& context,
                                     const RoundTokensBackwardArgs& args) const = 0;
  virtual void load_balancing_loss_forward(const Context& context, Scoring scoring,
                                           std::int64_t top_k, ConstTensorView logits,
                                           ConstTensorView rows_per_expert,
                                           TensorView loss) const = 0;
  virtual void load_balancing_loss_backward(const Context& context, Scoring scoring,
                                            std::int64_t top_k, ConstTensorView logits,
                                            ConstTensorView rows_per_expert,
                                            ConstTensorView grad_loss,
                                            TensorView grad_logits) const = 0;
  virtual void router_z_loss_forward(const Context& context, ConstTensorView logits,
                                     TensorView loss) const = 0;
  virtual void router_z_loss_backward(const Context& context, ConstTensorView logits,
                                      ConstTensorView grad_loss, TensorView grad_logits) const = 0;
  virtual void update_expert_bias(const Context& context, TensorView bias,
                                  ConstTensorView rows_per_expert, float rate) const = 0;

  /// grad_logits += addend, both [T, E] float32 contiguous: what auxiliary losses add to the
  /// routing's gradient.
  virtual void add_logits_gradient(const Context& context, TensorView grad_logits,
                                   ConstTensorView addend) const = 0;

  // Router GEMMs of moe_layer (the share of dX is RouterShare's).
  /// logits [T, E] float32 = x [T, d] weight [E, d]^T + bias [E] (may be absent).
  virtual void router_logits(const Context& context, ConstTensorView x, ConstTensorView weight,
                             ConstTensorView bias, TensorView logits,
                             TensorView workspace) const = 0;
  /// grad_weight [E, d] = grad_logits^T x, grad_bias [E] = column sums; either may be absent;
  /// overwritten, or added to with `accumulate`. grad_logits [T, E] is float32, or what
  /// moe_backward() left in RouterShare (on CUDA 16 bits of each value).
  virtual void router_logits_backward(const Context& context, ConstTensorView x,
                                      ConstTensorView grad_logits, TensorView grad_weight,
                                      TensorView grad_bias, bool accumulate,
                                      TensorView workspace) const = 0;
  /// Scratch of either of the two.
  virtual std::size_t router_logits_workspace_bytes(const Context& context,
                                                    const MoEShape& shape) const = 0;
};

/// Every backend of this build, in order of preference, the reference last.
std::span<const std::unique_ptr<Backend>> backend_list();

/// The backend for a call of `operation`: context.backend if named, else SONICMOE_BACKEND, else the
/// first available one that serves the device. Adds the choice and its reasons to the
/// DispatchLine. Throws Error when none fits, with each backend's reason.
const Backend& choose_backend(const Context& context, std::string_view operation);

// Factories, one per backend folder. A backend left out of the build has none.
std::unique_ptr<Backend> make_cpu_backend();
std::unique_ptr<Backend> make_cuda_backend();
std::unique_ptr<Backend> make_reference_backend();

}  // namespace sonicmoe
