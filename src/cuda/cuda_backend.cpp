// The CUDA backend: the expert layer on Hopper GPUs, bfloat16. The router's operations are not here
// yet; they say so.
#include "core/backend.hpp"
#include "cuda/device.hpp"
#include "cuda/experts/experts.hpp"
#include "sonicmoe/error.hpp"

namespace sonicmoe {
namespace {

[[noreturn]] void no_router(const char* operation) {
  throw Error(std::string(operation) + ": the cuda backend has no router yet");
}

class CudaBackend final : public Backend {
 public:
  std::string_view name() const override { return "cuda"; }
  std::string unavailable_reason() const override { return cuda::unavailable_reason(); }
  std::string description() const override { return cuda::description() + ", bfloat16"; }
  bool serves(DeviceType type) const override { return type == DeviceType::kCuda; }

  WorkspacePlan moe_forward_workspace(const Context&, const MoEShape& shape, bool inference,
                                      std::optional<std::size_t> limit) const override {
    return cuda::forward_plan(shape, inference, limit);
  }
  WorkspacePlan moe_backward_workspace(const Context&, const MoEShape& shape,
                                       std::optional<std::size_t> limit) const override {
    return cuda::backward_plan(shape, limit);
  }
  void moe_forward(const Context& context, const MoEShape& shape,
                   const MoEForwardArgs& args) const override {
    const cuda::DeviceGuard guard(context.device.index);
    cuda::forward(context, shape, args);
  }
  void moe_backward(const Context& context, const MoEShape& shape, const MoEBackwardArgs& args,
                    const RouterShare* router) const override {
    if (router != nullptr) no_router("moe_layer_backward");
    const cuda::DeviceGuard guard(context.device.index);
    cuda::backward(context, shape, args);
  }

  void route_forward(const Context&, const RouteForwardArgs&) const override {
    no_router("route_forward");
  }
  void route_backward(const Context&, const RouteBackwardArgs&) const override {
    no_router("route_backward");
  }
  std::size_t round_tokens_workspace_bytes(const Context&, std::int64_t, std::int64_t,
                                           std::int64_t) const override {
    no_router("round_tokens_workspace_bytes");
  }
  void round_tokens_forward(const Context&, const RoundTokensForwardArgs&) const override {
    no_router("round_tokens_forward");
  }
  void round_select(const Context&, const RoundSelectArgs&) const override {
    no_router("round_select");
  }
  void round_tokens_backward(const Context&, const RoundTokensBackwardArgs&) const override {
    no_router("round_tokens_backward");
  }
  void load_balancing_loss_forward(const Context&, Scoring, std::int64_t, ConstTensorView,
                                   ConstTensorView, TensorView) const override {
    no_router("load_balancing_loss_forward");
  }
  void load_balancing_loss_backward(const Context&, Scoring, std::int64_t, ConstTensorView,
                                    ConstTensorView, ConstTensorView, TensorView) const override {
    no_router("load_balancing_loss_backward");
  }
  void router_z_loss_forward(const Context&, ConstTensorView, TensorView) const override {
    no_router("router_z_loss_forward");
  }
  void router_z_loss_backward(const Context&, ConstTensorView, ConstTensorView,
                              TensorView) const override {
    no_router("router_z_loss_backward");
  }
  void update_expert_bias(const Context&, TensorView, ConstTensorView, float) const override {
    no_router("update_expert_bias");
  }
  void add_logits_gradient(const Context&, TensorView, ConstTensorView) const override {
    no_router("moe_layer_backward");
  }
  void router_logits(const Context&, ConstTensorView, ConstTensorView, ConstTensorView, TensorView,
                     TensorView) const override {
    no_router("moe_layer_forward");
  }
  void router_logits_backward(const Context&, ConstTensorView, ConstTensorView, TensorView,
                              TensorView, bool, TensorView) const override {
    no_router("moe_layer_backward");
  }
  std::size_t router_logits_workspace_bytes(const Context&, const MoEShape&) const override {
    no_router("moe_layer_workspace");
  }
};

}  // namespace

std::unique_ptr<Backend> make_cuda_backend() { return std::make_unique<CudaBackend>(); }

}  // namespace sonicmoe
