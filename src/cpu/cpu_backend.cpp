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

  WorkspacePlan moe_forward_workspace(const Context& context, const MoEShape& shape, bool inference,
                                      std::optional<std::size_t> limit) const override {
    return cpu::forward_plan(thread_count(context.num_threads), shape, inference, limit);
  }
  WorkspacePlan moe_backward_workspace(const Context& context, const MoEShape& shape,
                                       std::optional<std::size_t> limit) const override {
    return cpu::backward_plan(thread_count(context.num_threads), shape, limit);
  }
  void moe_forward(const Context& context, const MoEShape& shape,
                   const MoEForwardArgs& args) const override {
    cpu::prepare_gemm();
    cpu::forward(thread_count(context.num_threads), shape, args);
  }
  void moe_backward(const Context& context, const MoEShape& shape, const MoEBackwardArgs& args,
                    RouterShare* router) const override {
    cpu::prepare_gemm();
    cpu::backward(thread_count(context.num_threads), shape, args, router);
  }

  void router_logits(const Context& context, ConstTensorView x, ConstTensorView weight,
                     ConstTensorView bias, TensorView logits, TensorView workspace) const override {
    cpu::prepare_gemm();
    cpu::router_logits(thread_count(context.num_threads), x, weight, bias, logits,
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
  std::size_t router_logits_workspace_bytes(const Context& context,
                                            const MoEShape& shape) const override {
    return cpu::router_gemm_workspace_bytes(thread_count(context.num_threads), shape);
  }
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend() { return std::make_unique<CpuBackend>(); }

}  // namespace sonicmoe
