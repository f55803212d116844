#include "rig/large_layer.hpp"

#include <algorithm>

#include "rig/spot_check.hpp"
#include "sonicmoe/backend.hpp"
#include "sonicmoe/memory.hpp"

namespace sonicmoe::rig {
namespace {

// The backend of the context's calls is the reference: named, or the only one of this build.
bool serves_as_reference(const Context& context) {
  if (!context.backend.empty() || context.device.type != DeviceType::kCpu) {
    return context.backend == "reference";
  }
  const auto list = backends();
  return std::none_of(list.begin(), list.end(), [](const BackendInfo& backend) {
    return backend.name == "cpu" && backend.available;
  });
}

}  // namespace

LargeLayer::LargeLayer(const Context& context, MoECase sizes, bool with_router,
                       std::optional<std::size_t> workspace_limit)
    : target_(target_of(context)) {
  sizes.biases = false;
  sizes.values = Numbers::kLarge;
  if (with_router) {
    LayerCase layer;
    layer.experts = sizes;
    layer.router.scoring = Scoring::kTopKSoftmax;
    layer.router_dtype = layer.router_gradient_dtype = sizes.dtype;
    layer_ = std::make_unique<LayerRun>(target_, layer, workspace_limit, workspace_limit);
    return;
  }
  RunOptions options;
  options.forward_limit = options.backward_limit = workspace_limit;
  inputs_ = std::make_unique<MoEInputs>(target_, sizes);
  experts_ = std::make_unique<ExpertsRun>(target_, *inputs_, options);
}

std::vector<std::string> LargeLayer::check() const {
  if (!layer_) {
    const ExpertsRun& run = *experts_;
    return spot_check({*inputs_, inputs_->topk_ids, inputs_->routing_weights, run.h, run.out,
                       run.grad_x, run.grad_w1, run.grad_w2, run.grad_routing_weights});
  }
  const LayerRun& run = *layer_;
  const Tensor grad_weights = run.grad_routing_weights();
  return spot_check({run.inputs, run.topk_ids, run.routing_weights, run.h, run.out, run.grad_x,
                     run.grad_w1, run.grad_w2, grad_weights, &run.router_weight,
                     &run.grad_router_weight});
}

std::size_t LargeLayer::kept_bytes() const {
  const auto bytes = [](const auto& run, const Tensor& ids, const Tensor& weights) {
    return run.h.view().nbytes() + run.metadata.size() + ids.view().nbytes() +
           weights.view().nbytes();
  };
  return layer_ ? bytes(*layer_, layer_->topk_ids, layer_->routing_weights)
                : bytes(*experts_, inputs_->topk_ids, inputs_->routing_weights);
}

std::size_t LargeLayer::peak_forward_bytes() const {
  const auto bytes = [](const auto& run) {
    return run.forward_workspace.size() + run.out.view().nbytes();
  };
  return kept_bytes() + (layer_ ? bytes(*layer_) : bytes(*experts_));
}

std::size_t LargeLayer::peak_backward_bytes() const {
  const auto bytes = [](const auto& run) {
    return run.backward_workspace.size() + run.grad_x.view().nbytes();
  };
  return kept_bytes() + (layer_ ? bytes(*layer_) : bytes(*experts_));
}

std::size_t LargeLayer::total_bytes(const Context& context, const MoEShape& shape, bool with_router,
                                    std::optional<std::size_t> workspace_limit) {
  const std::size_t width = static_cast<std::size_t>(shape.num_tokens * shape.hidden_size) *
                            size_of(shape.numerics.storage);
  const auto limit = with_router ? std::nullopt : workspace_limit;
  return 2 * parameter_bytes(shape) + 4 * width +  // X, O, dO, dX
         estimate_memory(shape).kept() +
         moe_forward_workspace(context, shape, /*inference=*/false, limit).bytes +
         moe_backward_workspace(context, shape, limit).bytes;
}

double LargeLayer::reference_bytes(const Context& context, const MoEShape& shape, bool with_check) {
  // Weights and rows in float64 with their gradients; of a checked part also both in float32.
  constexpr double kOfCalls = 16, kOfParts = 24, kCheckedTokens = 3;
  const double d = static_cast<double>(shape.hidden_size);
  const double T = static_cast<double>(shape.num_tokens);
  const double E = static_cast<double>(shape.num_experts);
  const double pairs = static_cast<double>(shape.num_pairs);
  const double expert =
      (gate_factor(shape.activation) + 1) * static_cast<double>(shape.intermediate_size) * d;
  const double calls = serves_as_reference(context) ? E * expert + T * d : 0.0;
  const double parts =
      with_check ? std::min(T, kCheckedTokens) * pairs / T * expert + pairs / E * d : 0.0;
  return kOfCalls * calls + kOfParts * parts;
}

}  // namespace sonicmoe::rig
