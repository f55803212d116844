// The CPU backend: experts and router GEMMs on oneDNN, routing on the host.
#include "core/parallel.hpp"
#include "cpu/experts.hpp"
#include "cpu/gemm.hpp"
#include "cpu/router_gemm.hpp"
#include "router/host_router.hpp"

namespace sonicmoe {
namespace {

class CpuBackend final : public HostRouterBackend {
 public:
  std::string_view name() const override { return "cpu"; }
  std::string description() const override {
    return cpu::gemm_description() +
           (cpu::native_bfloat16() ? "" : ", bfloat16 computed in float32") + ", " +
           std::to_string(thread_count(0)) + " threads";
  }
  bool serves(DeviceType type) const override { return type == DeviceType::kCpu; }

  ExpertPlan plan_moe_forward(const Context& context, const MoEShape& shape, bool inference,
                              std::optional<std::size_t> limit) const override {
    return cpu::plan_forward(thread_count(context.num_threads), shape, inference, limit);
  }
  ExpertPlan plan_moe_backward(const Context& context, const MoEShape& shape,
                               std::optional<std::size_t> limit, BackwardStep step) const override {
    return cpu::plan_backward(thread_count(context.num_threads), shape, limit, step);
  }
  void moe_forward(const Context& context, const ExpertPlan& plan,
                   const MoEForwardArgs& args) const override {
    cpu::prepare_gemm();
    cpu::forward(thread_count(context.num_threads), plan, args);
  }
  void moe_backward(const Context& context, const ExpertPlan& plan,
                    const MoEBackwardArgs& args) const override {
    cpu::prepare_gemm();
    const int threads = thread_count(context.num_threads);
    using enum BackwardStep;
    for (const BackwardStep step : {kHidden, kDown, kInput, kUp}) {
      cpu::backward_step(threads, plan, args, step);
    }
  }
  void moe_layer_backward(const Context& context, const LayerPlan& plan,
                          const MoELayerBackwardArgs& args) const override {
    cpu::prepare_gemm();
    using enum BackwardStep;
    const int threads = thread_count(context.num_threads);
    const LayerBackwardScratch scratch = layer_scratch(plan, args);
    const MoEBackwardArgs experts = expert_args(args, scratch);
    const cpu::RouterGradX router{scratch.grad_logits, args.router_weight};
    cpu::backward_step(threads, plan.experts, experts, kHidden);
    // May still refuse the ids: before anything is added to the caller's gradients.
    if (does(args.step, kInput)) host_grad_logits(context, args, scratch);
    cpu::backward_step(threads, plan.experts, experts, kDown);
    cpu::backward_step(threads, plan.experts, experts, kInput, &router);
    if (does(args.step, kInput)) {
      router_logits_backward(context, args.x, scratch.grad_logits, args.grad_router_weight,
                             args.grad_router_bias, args.accumulate, scratch.router);
    }
    cpu::backward_step(threads, plan.experts, experts, kUp);
  }

  std::size_t router_logits_workspace_bytes(const Context& context,
                                            const MoEShape&) const override {
    return cpu::router_gemm_workspace_bytes(thread_count(context.num_threads));
  }
  std::size_t router_logits_backward_workspace_bytes(const Context& context,
                                                     const MoEShape&) const override {
    return cpu::router_gemm_workspace_bytes(thread_count(context.num_threads));
  }
  void router_logits(const Context& context, ConstTensorView x, ConstTensorView weight,
                     ConstTensorView bias, TensorView logits, TensorView workspace) const override {
    cpu::prepare_gemm();
    cpu::router_logits(thread_count(context.num_threads), x, weight, bias, logits,
                       workspace.data());
  }
  void router_grad_x(const Context& context, ConstTensorView grad_logits, ConstTensorView weight,
                     TensorView grad_x, TensorView workspace) const override {
    cpu::prepare_gemm();
    cpu::router_grad_x(thread_count(context.num_threads), grad_logits, weight, grad_x,
                       workspace.data());
  }
  void router_logits_backward(const Context& context, ConstTensorView x,
                              ConstTensorView grad_logits, TensorView grad_weight,
                              TensorView grad_bias, bool accumulate,
                              TensorView workspace) const override {
    cpu::prepare_gemm();
    cpu::router_logits_backward(thread_count(context.num_threads), x, grad_logits, grad_weight,
                                grad_bias, accumulate, workspace.data());
  }
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend() { return std::make_unique<CpuBackend>(); }

}  // namespace sonicmoe
