// Validation and dispatch of router_logits_forward and router_logits_backward.
#include "api/arguments.hpp"
#include "api/checks.hpp"
#include "core/backend.hpp"
#include "core/workspace.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe {
namespace {

// T, E and d, of which alone a backend's scratch depends.
MoEShape checked_shape(const Check& check, std::int64_t num_tokens, std::int64_t num_experts,
                       std::int64_t hidden_size) {
  check_router_sizes(check, num_tokens, num_experts, /*top_k=*/1);
  check.between("hidden_size", hidden_size, 1, std::int64_t{1} << 31);
  MoEShape shape;
  shape.num_tokens = num_tokens;
  shape.num_experts = num_experts;
  shape.hidden_size = hidden_size;
  return shape;
}

void check_x(const Check& check, const char* name, const ConstTensorView& x) {
  check.rank(name, x, 2);
  check.dtype(name, x, {DType::kFloat32, DType::kBFloat16});
  check.that(x.size(1) > 0, name, "hidden_size > 0", x.describe());
  check.unit_stride(name, x, 1);
}

MoEShape shape_of(const Check& check, const ConstTensorView& x, const ConstTensorView& weight) {
  check_x(check, "x", x);
  check.rank("router_weight", weight, 2);
  check.that(weight.size(0) > 0, "router_weight", "at least one expert", weight.describe());
  return checked_shape(check, x.size(0), weight.size(0), x.size(1));
}

void check_gradients(const Check& check, const RouterLogitsBackwardArgs& args) {
  if (args.grad_x.defined()) {
    check.shape_like("grad_x", args.grad_x, args.x);
    check.dtype("grad_x", args.grad_x, {args.x.dtype()});
    check.unit_stride("grad_x", args.grad_x, 1);
  }
  check_parameter_gradient(check, "grad_router_weight", args.grad_router_weight, args.router_weight,
                           /*accumulate=*/false);
  if (args.grad_router_weight.defined()) {
    check.unit_stride("grad_router_weight", args.grad_router_weight, 1);
  }
  check_router_bias_gradient(check, args.grad_router_bias, args.router_weight,
                             /*accumulate=*/false);
}

}  // namespace

void check_router(const Check& check, const ConstTensorView& x, const ConstTensorView& weight,
                  const ConstTensorView& bias, const ConstTensorView& logits,
                  std::int64_t num_experts) {
  check.rank("x", x, 2);
  check.shape("router_weight", weight, {num_experts, x.size(1)});
  check.dtype("router_weight", weight, {x.dtype(), DType::kFloat32});
  check.unit_stride("router_weight", weight, 1);
  if (bias.defined()) {
    check.shape("router_bias", bias, {num_experts});
    check.dtype("router_bias", bias, {weight.dtype(), DType::kFloat32});
    check.unit_stride("router_bias", bias, 0);
  }
  check.shape("logits", logits, {x.size(0), num_experts});
  check.dtype("logits", logits, {DType::kFloat32});
  check.contiguous("logits", logits);
}

void check_router_bias_gradient(const Check& check, const ConstTensorView& grad,
                                const ConstTensorView& weight, bool accumulate) {
  if (!grad.defined()) return;
  check.shape("grad_router_bias", grad, {weight.size(0)});
  if (accumulate) check.dtype("grad_router_bias", grad, {DType::kFloat32});
  check.dtype("grad_router_bias", grad, {weight.dtype(), DType::kFloat32});
  check.unit_stride("grad_router_bias", grad, 0);
}

std::size_t router_logits_forward_workspace_bytes(const Context& context, std::int64_t num_tokens,
                                                  std::int64_t num_experts,
                                                  std::int64_t hidden_size) {
  return answer("router_logits_forward_workspace_bytes", context, [&](const Check& check) {
    const MoEShape shape = checked_shape(check, num_tokens, num_experts, hidden_size);
    return choose_backend(context, check.operation()).router_logits_workspace_bytes(context, shape);
  });
}

std::size_t router_logits_backward_workspace_bytes(const Context& context, std::int64_t num_tokens,
                                                   std::int64_t num_experts,
                                                   std::int64_t hidden_size) {
  return answer("router_logits_backward_workspace_bytes", context, [&](const Check& check) {
    const MoEShape shape = checked_shape(check, num_tokens, num_experts, hidden_size);
    return choose_backend(context, check.operation())
        .router_logits_backward_workspace_bytes(context, shape);
  });
}

void router_logits_forward(const Context& context, const RouterLogitsForwardArgs& args) {
  run_operation("router_logits_forward", context, [&](const Check& check) {
    const MoEShape shape = shape_of(check, args.x, args.router_weight);
    check_router(check, args.x, args.router_weight, args.router_bias, args.logits,
                 shape.num_experts);
    const Backend& backend = choose_backend(context, check.operation());
    backend.check_router_logits(check, args.x);
    check.buffer("workspace", args.workspace, backend.router_logits_workspace_bytes(context, shape),
                 WorkspaceCarver::kAlignment);
    check_memory(check, args);
    backend.router_logits(context, args.x, args.router_weight, args.router_bias, args.logits,
                          args.workspace);
  });
}

void router_logits_backward(const Context& context, const RouterLogitsBackwardArgs& args) {
  run_operation("router_logits_backward", context, [&](const Check& check) {
    const MoEShape shape = shape_of(check, args.x, args.router_weight);
    check.shape("router_weight", args.router_weight, {shape.num_experts, shape.hidden_size});
    check.dtype("router_weight", args.router_weight, {args.x.dtype(), DType::kFloat32});
    check.unit_stride("router_weight", args.router_weight, 1);
    check.shape("grad_logits", args.grad_logits, {shape.num_tokens, shape.num_experts});
    check.dtype("grad_logits", args.grad_logits, {DType::kFloat32});
    check.contiguous("grad_logits", args.grad_logits);
    check_gradients(check, args);
    const Backend& backend = choose_backend(context, check.operation());
    backend.check_router_logits(check, args.x);
    check.buffer("workspace", args.workspace,
                 backend.router_logits_backward_workspace_bytes(context, shape),
                 WorkspaceCarver::kAlignment);
    check_memory(check, args);
    if (args.grad_x.defined()) {
      backend.router_grad_x(context, args.grad_logits, args.router_weight, args.grad_x,
                            args.workspace);
    }
    backend.router_logits_backward(context, args.x, args.grad_logits, args.grad_router_weight,
                                   args.grad_router_bias, /*accumulate=*/false, args.workspace);
  });
}

}  // namespace sonicmoe
