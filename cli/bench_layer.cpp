#include "cli/bench_layer.hpp"

#include <algorithm>
#include <cmath>

#include "sonicmoe/backend.hpp"
#include "sonicmoe/memory.hpp"

#if defined(__unix__)
#include <unistd.h>
#endif

namespace sonicmoe::cli {
namespace {

ExpertsConfig config_of(const LayerShape& shape, DType dtype, const LayerOptions& options) {
  ExpertsConfig config;
  config.num_tokens = shape.num_tokens;
  config.hidden_size = shape.hidden_size;
  config.intermediate_size = shape.intermediate_size;
  config.num_experts = shape.num_experts;
  config.top_k = shape.top_k;
  config.options.activation = options.activation;
  config.dtype = dtype;
  return config;
}

MoEShape shape_of(const LayerShape& layer, DType dtype, const LayerOptions& options) {
  MoEShape shape;
  shape.num_tokens = layer.num_tokens;
  shape.hidden_size = layer.hidden_size;
  shape.intermediate_size = layer.intermediate_size;
  shape.num_experts = layer.num_experts;
  shape.num_pairs = layer.num_tokens * layer.top_k;
  shape.activation = options.activation;
  shape.numerics = Numerics::of(dtype);
  return shape;
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
                       const LayerOptions& options, Random& random)
    : options_(options),
      inputs_(config_of(shape, dtype, options), random, context.device),
      shape_(inputs_.shape()),
      run_(context, inputs_, options.with_router ? std::nullopt : options.workspace_limit) {
  if (!options.with_router) return;
  run_.forward_workspace = run_.backward_workspace = {};  // the layer has its own
  layer_options_.experts = inputs_.config.options;
  layer_options_.router.top_k = shape.top_k;
  layer_options_.router.scoring = Scoring::kTopKSoftmax;
  const Device device = context.device;
  router_weight_ = Tensor(dtype, {shape.num_experts, shape.hidden_size}, device);
  router_weight_.fill_random(random, 1.0 / std::sqrt(static_cast<double>(shape.hidden_size)));
  grad_router_weight_ = Tensor(dtype, {shape.num_experts, shape.hidden_size}, device);
  logits_ = Tensor(DType::kFloat32, {shape.num_tokens, shape.num_experts}, device);
  rows_per_expert_ = Tensor(DType::kInt32, {shape.num_experts}, device);
  const auto workspace = [&](const WorkspacePlan& plan) {
    return Tensor(DType::kUInt8, {static_cast<std::int64_t>(plan.bytes)}, device);
  };
  layer_forward_workspace_ = workspace(moe_layer_forward_workspace(
      context, layer_options_, shape_, /*inference=*/false, options.workspace_limit));
  layer_backward_workspace_ = workspace(
      moe_layer_backward_workspace(context, layer_options_, shape_, options.workspace_limit));
}

void BenchLayer::forward(const Context& context) {
  options_.with_router ? layer_forward(context) : run_.forward(context);
}

void BenchLayer::backward(const Context& context) {
  options_.with_router ? layer_backward(context) : run_.backward(context);
}

void BenchLayer::layer_forward(const Context& context) {
  MoELayerForwardArgs args;
  args.options = layer_options_;
  args.x = inputs_.x.view();
  args.router_weight = router_weight_.view();
  args.weights = inputs_.weights();
  args.out = run_.out.view();
  args.logits = logits_.view();
  args.rows_per_expert = rows_per_expert_.view();
  args.saved.topk_ids = inputs_.topk_ids.view();
  args.saved.routing_weights = inputs_.topk_weights.view();
  args.saved.h = run_.h.view();
  args.saved.metadata = run_.metadata.view();
  args.workspace = layer_forward_workspace_.view();
  args.workspace_limit = options_.workspace_limit;
  moe_layer_forward(context, args);
}

void BenchLayer::layer_backward(const Context& context) {
  MoELayerBackwardArgs args;
  args.options = layer_options_;
  args.grad_out = inputs_.grad_out.view();
  args.x = inputs_.x.view();
  args.router_weight = router_weight_.view();
  args.weights = inputs_.weights();
  args.logits = logits_.view();
  args.saved.topk_ids = inputs_.topk_ids.view();
  args.saved.routing_weights = inputs_.topk_weights.view();
  args.saved.h = run_.h.view();
  args.saved.metadata = run_.metadata.view();
  args.grad_x = run_.grad_x.view();
  args.grad_router_weight = grad_router_weight_.view();
  args.grad_w1 = run_.grad_w1.view();
  args.grad_w2 = run_.grad_w2.view();
  args.workspace = layer_backward_workspace_.view();
  args.workspace_limit = options_.workspace_limit;
  moe_layer_backward(context, args);
}

std::size_t BenchLayer::kept_bytes() const {
  return run_.h.view().nbytes() + run_.metadata.view().nbytes() + inputs_.topk_ids.view().nbytes() +
         inputs_.topk_weights.view().nbytes();
}

std::size_t BenchLayer::peak_forward_bytes() const {
  const Tensor& workspace =
      options_.with_router ? layer_forward_workspace_ : run_.forward_workspace;
  return kept_bytes() + workspace.view().nbytes() + run_.out.view().nbytes();
}

std::size_t BenchLayer::peak_backward_bytes() const {
  const Tensor& workspace =
      options_.with_router ? layer_backward_workspace_ : run_.backward_workspace;
  return kept_bytes() + workspace.view().nbytes() + run_.grad_x.view().nbytes();
}

std::size_t BenchLayer::total_bytes(const Context& context, const LayerShape& layer, DType dtype,
                                    const LayerOptions& options) {
  const MoEShape shape = shape_of(layer, dtype, options);
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
