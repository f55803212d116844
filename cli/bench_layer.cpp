#include "cli/bench_layer.hpp"

#include <algorithm>

#include "cli/resources.hpp"
#include "rig/spot_check.hpp"
#include "sonicmoe/backend.hpp"
#include "sonicmoe/memory.hpp"

#if defined(__unix__)
#include <unistd.h>
#endif

namespace sonicmoe::cli {
namespace {

rig::MoECase case_of(const LayerShape& shape, DType dtype, const LayerOptions& options,
                     std::uint64_t seed) {
  rig::MoECase c;
  c.num_tokens = shape.num_tokens;
  c.hidden_size = shape.hidden_size;
  c.intermediate_size = shape.intermediate_size;
  c.num_experts = shape.num_experts;
  c.top_k = shape.top_k;
  c.activation = options.activation;
  c.dtype = dtype;
  c.biases = false;
  c.values = rig::Numbers::kLarge;
  c.seed = seed;
  return c;
}

// The backend of the context's calls is the reference: named, or the only one of this build.
bool serves_as_reference(const Context& context) {
  if (!context.backend.empty() || !on_host(context.device)) return context.backend == "reference";
  const auto list = backends();
  return std::none_of(list.begin(), list.end(), [](const BackendInfo& backend) {
    return backend.name == "cpu" && backend.available;
  });
}

}  // namespace

BenchLayer::BenchLayer(const Context& context, const LayerShape& shape, DType dtype,
                       const LayerOptions& options, std::uint64_t seed)
    : target_(rig::target_of(context)) {
  const rig::MoECase c = case_of(shape, dtype, options, seed);
  const auto limit = options.workspace_limit;
  if (options.with_router) {
    rig::LayerCase layer;
    layer.experts = c;
    layer.router.scoring = Scoring::kTopKSoftmax;
    layer.router_dtype = layer.router_gradient_dtype = dtype;
    layer_ = std::make_unique<rig::LayerRun>(target_, layer, limit, limit);
    return;
  }
  rig::RunOptions run;
  run.forward_limit = run.backward_limit = limit;
  inputs_ = std::make_unique<rig::MoEInputs>(target_, c);
  experts_ = std::make_unique<rig::ExpertsRun>(target_, *inputs_, run);
}

std::vector<std::string> BenchLayer::check() const {
  if (!layer_) {
    const rig::ExpertsRun& run = *experts_;
    return rig::spot_check({*inputs_, inputs_->topk_ids, inputs_->routing_weights, run.h, run.out,
                            run.grad_x, run.grad_w1, run.grad_w2, run.grad_routing_weights});
  }
  const rig::LayerRun& run = *layer_;
  const rig::Tensor grad_weights = run.grad_routing_weights();
  return rig::spot_check({run.inputs, run.topk_ids, run.pair_weights, run.h, run.out, run.grad_x,
                          run.grad_w1, run.grad_w2, grad_weights, &run.router_weight,
                          &run.grad_router_weight});
}

std::size_t BenchLayer::kept_bytes() const {
  const auto bytes = [](const auto& run, const rig::Tensor& ids, const rig::Tensor& weights) {
    return run.h.view().nbytes() + run.metadata.size() + ids.view().nbytes() +
           weights.view().nbytes();
  };
  return layer_ ? bytes(*layer_, layer_->topk_ids, layer_->pair_weights)
                : bytes(*experts_, inputs_->topk_ids, inputs_->routing_weights);
}

std::size_t BenchLayer::peak_forward_bytes() const {
  const auto bytes = [](const auto& run) {
    return run.forward_workspace.size() + run.out.view().nbytes();
  };
  return kept_bytes() + (layer_ ? bytes(*layer_) : bytes(*experts_));
}

std::size_t BenchLayer::peak_backward_bytes() const {
  const auto bytes = [](const auto& run) {
    return run.backward_workspace.size() + run.grad_x.view().nbytes();
  };
  return kept_bytes() + (layer_ ? bytes(*layer_) : bytes(*experts_));
}

std::size_t BenchLayer::total_bytes(const Context& context, const LayerShape& layer, DType dtype,
                                    const LayerOptions& options) {
  const MoEShape shape = layer.moe_shape(dtype, options.activation);
  const std::size_t width =
      static_cast<std::size_t>(shape.num_tokens * shape.hidden_size) * size_of(dtype);
  const auto limit = options.with_router ? std::nullopt : options.workspace_limit;
  return 2 * parameter_bytes(shape) + 4 * width +  // X, O, dO, dX
         estimate_memory(shape).kept() +
         moe_forward_workspace(context, shape, /*inference=*/false, limit).bytes +
         moe_backward_workspace(context, shape, limit).bytes;
}

double BenchLayer::reference_bytes(const Context& context, const LayerShape& shape,
                                   const LayerOptions& options, bool with_check) {
  // Weights and rows in float64 with their gradients; of a checked part also both in float32.
  constexpr double kOfCalls = 16, kOfParts = 24, kCheckedTokens = 3;
  const double d = static_cast<double>(shape.hidden_size), K = static_cast<double>(shape.top_k);
  const double T = static_cast<double>(shape.num_tokens),
               E = static_cast<double>(shape.num_experts);
  const double expert =
      (gate_factor(options.activation) + 1) * static_cast<double>(shape.intermediate_size) * d;
  const double calls = serves_as_reference(context) ? E * expert + T * d : 0.0;
  const double parts = with_check ? std::min(T, kCheckedTokens) * K * expert + T * K / E * d : 0.0;
  return kOfCalls * calls + kOfParts * parts;
}

std::size_t BenchLayer::sets_to_rotate(Device device, std::size_t bytes_of_one) {
  constexpr std::size_t kMostSets = 8;
  std::size_t cache = std::size_t{64} << 20;  // more than the L2 of a Hopper GPU
#if defined(_SC_LEVEL3_CACHE_SIZE)
  if (const long size = sysconf(_SC_LEVEL3_CACHE_SIZE); on_host(device) && size > 0) {
    cache = static_cast<std::size_t>(size);
  }
#endif
  return std::clamp<std::size_t>(cache / std::max<std::size_t>(bytes_of_one, 1) + 1, 1, kMostSets);
}

}  // namespace sonicmoe::cli
