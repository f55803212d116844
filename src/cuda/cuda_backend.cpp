// The CUDA backend: the expert layer and the router on Hopper GPUs. Expert computation in bfloat16,
// routing in float32.
#include "cuda/device.hpp"
#include "cuda/exchange/exchange.hpp"
#include "cuda/experts/experts.hpp"
#include "cuda/layer/layer.hpp"
#include "cuda/products.hpp"
#include "cuda/range.hpp"
#include "cuda/router/router.hpp"
#include "layer/composed_backend.hpp"
#include "sonicmoe/error.hpp"

namespace sonicmoe {
namespace {

namespace router = cuda::router;

// What every operation has around it: its device, and its name in a profiler.
class Call {
 public:
  Call(const Context& context, const char* operation)
      : guard_(context.device.index), range_(operation) {}

 private:
  cuda::DeviceGuard guard_;
  cuda::Range range_;
};

// No kernel takes them.
void refuse_targets(const char* operation, const ConstTensorView& targets) {
  if (!targets.defined()) return;
  throw Error(operation, "targets", "no tensor, as a GPU does not take them", targets.describe());
}

class CudaBackend final : public ComposedBackend {
 public:
  std::string_view name() const override { return "cuda"; }
  std::string unavailable_reason() const override { return cuda::unavailable_reason(); }
  std::string description() const override { return cuda::description() + ", bfloat16"; }
  bool serves(DeviceType type) const override { return type == DeviceType::kCuda; }
  std::vector<DeviceInfo> devices() const override { return cuda::devices(); }

  ExpertPlan plan_moe_forward(const Context&, const MoEShape& shape, bool inference,
                              std::optional<std::size_t> limit) const override {
    return cuda::plan_forward(shape, inference, limit);
  }
  ExpertPlan plan_moe_backward(const Context& context, const MoEShape& shape,
                               std::optional<std::size_t> limit, BackwardStep step) const override {
    return cuda::plan_backward(cuda::products_of(context.device.index), shape, limit, step);
  }
  std::size_t row_lists_bytes(const MoEShape& shape) const override {
    return cuda::row_lists_bytes(shape);
  }
  void check_moe_forward(const Check& check, const MoEShape& shape,
                         const MoEForwardArgs& args) const override {
    cuda::check_forward(check, shape, args);
  }
  void check_moe_backward(const Check& check, const MoEShape& shape,
                          const MoEBackwardArgs& args) const override {
    cuda::check_backward(check, shape, args);
  }
  void moe_forward(const Context& context, const ExpertPlan& plan,
                   const MoEForwardArgs& args) const override {
    const Call call(context, "moe_forward");
    cuda::forward(context, plan, args);
  }
  void moe_backward(const Context& context, const ExpertPlan& plan,
                    const MoEBackwardArgs& args) const override {
    const Call call(context, "moe_backward");
    cuda::backward(context, plan, args);
  }
  void moe_layer_forward(const Context& context, const LayerPlan& plan,
                         const MoELayerForwardArgs& args) const override {
    const cuda::Range range("moe_layer_forward");  // its parts see to the device
    ComposedBackend::moe_layer_forward(context, plan, args);
  }
  void moe_layer_backward(const Context& context, const LayerPlan& plan,
                          const MoELayerBackwardArgs& args) const override {
    const Call call(context, "moe_layer_backward");
    cuda::layer_backward(context, plan, args);
  }
  std::unique_ptr<ExchangePort> make_exchange(const Check& check, const Context& context,
                                              const ExchangeShape& shape, int rank,
                                              std::span<void* const> buffers,
                                              double timeout_seconds) const override {
    return cuda::make_exchange(check, context, shape, rank, buffers, timeout_seconds);
  }

  void route_forward(const Context& context, const RouteForwardArgs& args) const override {
    const Call call(context, "route_forward");
    router::route_forward(context, args);
  }
  void route_backward(const Context& context, const RouteBackwardArgs& args) const override {
    const Call call(context, "route_backward");
    router::route_backward(context, args);
  }
  std::size_t round_tokens_workspace_bytes(const Context& context, std::int64_t num_tokens,
                                           std::int64_t num_experts,
                                           std::int64_t top_k) const override {
    return router::round_tokens_workspace_bytes(context, num_tokens, num_experts, top_k);
  }
  void round_tokens_forward(const Context& context,
                            const RoundTokensForwardArgs& args) const override {
    refuse_targets("round_tokens_forward", args.targets);
    const Call call(context, "round_tokens_forward");
    router::round_tokens_forward(context, args);
  }
  void round_select(const Context& context, const RoundSelectArgs& args) const override {
    refuse_targets("round_select", args.targets);
    const Call call(context, "round_select");
    router::round_select(context, args);
  }
  void round_tokens_backward(const Context& context,
                             const RoundTokensBackwardArgs& args) const override {
    const Call call(context, "round_tokens_backward");
    router::round_tokens_backward(context, args);
  }
  void load_balancing_loss_forward(const Context& context, Scoring scoring, std::int64_t top_k,
                                   ConstTensorView logits, ConstTensorView rows_per_expert,
                                   TensorView loss) const override {
    const Call call(context, "load_balancing_loss_forward");
    router::load_balancing_loss_forward(context, scoring, top_k, logits, rows_per_expert, loss);
  }
  void load_balancing_loss_backward(const Context& context, Scoring scoring, std::int64_t top_k,
                                    ConstTensorView logits, ConstTensorView rows_per_expert,
                                    ConstTensorView grad_loss,
                                    TensorView grad_logits) const override {
    const Call call(context, "load_balancing_loss_backward");
    router::load_balancing_loss_backward(context, scoring, top_k, logits, rows_per_expert,
                                         grad_loss, grad_logits);
  }
  void router_z_loss_forward(const Context& context, ConstTensorView logits,
                             TensorView loss) const override {
    const Call call(context, "router_z_loss_forward");
    router::router_z_loss_forward(context, logits, loss);
  }
  void router_z_loss_backward(const Context& context, ConstTensorView logits,
                              ConstTensorView grad_loss, TensorView grad_logits) const override {
    const Call call(context, "router_z_loss_backward");
    router::router_z_loss_backward(context, logits, grad_loss, grad_logits);
  }
  void update_expert_bias(const Context& context, TensorView bias, ConstTensorView rows_per_expert,
                          float rate) const override {
    const Call call(context, "update_expert_bias");
    router::update_expert_bias(context, bias, rows_per_expert, rate);
  }

  void check_router_logits(const Check& check, const ConstTensorView& x) const override {
    check.dtype("x", x, {DType::kBFloat16});
    check.that(x.size(1) % cuda::kVectorElements == 0, "x", "a hidden size that is a multiple of 8",
               x.describe());
  }
  std::size_t router_logits_workspace_bytes(const Context&, const MoEShape&) const override {
    return 0;
  }
  std::size_t router_logits_backward_workspace_bytes(const Context& context,
                                                     const MoEShape& shape) const override {
    return router::router_logits_backward_workspace_bytes(context.device.index, shape);
  }
  void router_logits(const Context& context, ConstTensorView x, ConstTensorView weight,
                     ConstTensorView bias, TensorView logits, TensorView) const override {
    const Call call(context, "router_logits");
    router::router_logits(context, x, weight, bias, logits);
  }
  void router_grad_x(const Context& context, ConstTensorView grad_logits, ConstTensorView weight,
                     TensorView grad_x, TensorView workspace) const override {
    const Call call(context, "router_grad_x");
    const int device = context.device.index;
    MoEShape shape;
    shape.num_tokens = grad_logits.size(0);
    shape.num_experts = grad_logits.size(1);
    shape.hidden_size = weight.size(1);
    router::router_grad_x(context, {grad_logits.data(), shape.num_tokens, shape.num_experts},
                          weight, 0, shape.hidden_size, {grad_x.data(), grad_x.stride(0)},
                          router::router_grad_x_terms(workspace.data(), device, shape));
  }
  void router_logits_backward(const Context& context, ConstTensorView x,
                              ConstTensorView grad_logits, TensorView grad_weight,
                              TensorView grad_bias, bool accumulate,
                              TensorView workspace) const override {
    const Call call(context, "router_logits_backward");
    const router::LogitsGradient gradient{grad_logits.data(), grad_logits.size(0),
                                          grad_logits.size(1)};
    router::router_logits_backward(context, x, gradient, grad_weight, grad_bias, accumulate,
                                   workspace.data());
  }
};

}  // namespace

std::unique_ptr<Backend> make_cuda_backend() { return std::make_unique<CudaBackend>(); }

}  // namespace sonicmoe
