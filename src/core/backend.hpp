// The internal contract of a backend and the list that chooses one.
//
// src/api/ validates arguments, chooses a backend, asks it for a plan and calls the operation: one
// method here for each public operation. A backend may rely on everything the public headers
// promise about shapes, dtypes, strides, alignment and the size of the workspace. Most backends
// derive from ComposedBackend (layer/composed_backend.hpp), which makes moe_layer of the parts.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/check.hpp"
#include "core/exchange.hpp"
#include "core/plan.hpp"
#include "sonicmoe/backend.hpp"
#include "sonicmoe/moe.hpp"
#include "sonicmoe/moe_layer.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe {

class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string_view name() const = 0;
  /// Empty when the backend can run on this machine, else one line that says why not.
  virtual std::string unavailable_reason() const { return {}; }
  /// What it runs on: "oneDNN 2.6.3, AVX2, 2 threads".
  virtual std::string description() const = 0;
  virtual bool serves(DeviceType type) const = 0;
  /// The devices that it finds beside the CPU.
  virtual std::vector<DeviceInfo> devices() const { return {}; }

  // Plans. `shape` is moe_shape() or moe_layer_shape() of the arguments.
  virtual ExpertPlan plan_moe_forward(const Context& context, const MoEShape& shape, bool inference,
                                      std::optional<std::size_t> limit) const = 0;
  virtual ExpertPlan plan_moe_backward(const Context& context, const MoEShape& shape,
                                       std::optional<std::size_t> limit,
                                       BackwardStep step) const = 0;
  virtual LayerPlan plan_moe_layer_forward(const Context& context, const MoELayerOptions& options,
                                           const MoEShape& shape, bool inference,
                                           std::optional<std::size_t> limit) const = 0;
  virtual LayerPlan plan_moe_layer_backward(const Context& context, const MoELayerOptions& options,
                                            const MoEShape& shape, std::optional<std::size_t> limit,
                                            BackwardStep step) const = 0;
  /// moe_row_lists_bytes().
  virtual std::size_t row_lists_bytes(const MoEShape&) const { return 0; }

  // What the public headers allow and this backend cannot serve: throws, before anything of an
  // operation runs. The workspace may be absent.
  virtual void check_moe_forward(const Check&, const MoEShape&, const MoEForwardArgs&) const {}
  virtual void check_moe_backward(const Check&, const MoEShape&, const MoEBackwardArgs&) const {}

  // Experts.
  virtual void moe_forward(const Context& context, const ExpertPlan& plan,
                           const MoEForwardArgs& args) const = 0;
  virtual void moe_backward(const Context& context, const ExpertPlan& plan,
                            const MoEBackwardArgs& args) const = 0;

  // The layer. Its experts' part has passed the checks above.
  virtual void moe_layer_forward(const Context& context, const LayerPlan& plan,
                                 const MoELayerForwardArgs& args) const = 0;
  virtual void moe_layer_backward(const Context& context, const LayerPlan& plan,
                                  const MoELayerBackwardArgs& args) const = 0;

  /// A rank's end of an exchange; its arguments have been checked. layer/exchange.hpp runs the
  /// operations on it. Refuses by `check` what it cannot take.
  virtual std::unique_ptr<ExchangePort> make_exchange(const Check& check, const Context& context,
                                                      const ExchangeShape& shape, int rank,
                                                      std::span<void* const> buffers,
                                                      double timeout_seconds) const = 0;

  // The router's products.
  /// What the public header allows of x and this backend cannot serve: throws.
  virtual void check_router_logits(const Check&, const ConstTensorView& /*x*/) const {}
  /// Scratch of router_logits(), and of router_grad_x() and router_logits_backward().
  virtual std::size_t router_logits_workspace_bytes(const Context& context,
                                                    const MoEShape& shape) const = 0;
  virtual std::size_t router_logits_backward_workspace_bytes(const Context& context,
                                                             const MoEShape& shape) const = 0;
  /// logits [T, E] float32 = x [T, d] weight [E, d]^T + bias [E] (may be absent).
  virtual void router_logits(const Context& context, ConstTensorView x, ConstTensorView weight,
                             ConstTensorView bias, TensorView logits,
                             TensorView workspace) const = 0;
  /// grad_x [T, d], dtype of x, = grad_logits [T, E] float32 weight [E, d].
  virtual void router_grad_x(const Context& context, ConstTensorView grad_logits,
                             ConstTensorView weight, TensorView grad_x,
                             TensorView workspace) const = 0;
  /// grad_weight [E, d] = grad_logits^T x, grad_bias [E] = column sums of grad_logits [T, E]
  /// float32; either may be absent; overwritten, or added to with `accumulate`.
  virtual void router_logits_backward(const Context& context, ConstTensorView x,
                                      ConstTensorView grad_logits, TensorView grad_weight,
                                      TensorView grad_bias, bool accumulate,
                                      TensorView workspace) const = 0;

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
};

/// Every backend of this build, in order of preference, the reference last.
std::span<const std::unique_ptr<Backend>> backend_list();

/// The backend for a call of `operation`: context.backend if named, else SONICMOE_BACKEND, else the
/// first available one that serves the device. Adds the choice and its reasons to the
/// DispatchLine. Throws Error when none fits, with each backend's reason.
const Backend& choose_backend(const Context& context, std::string_view operation);

}  // namespace sonicmoe
