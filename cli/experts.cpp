#include "cli/experts.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace sonicmoe::cli {
namespace {

using Form = MoEShape::Form;

Tensor make_tensor(DType dtype, std::vector<std::int64_t> shape, Device device, bool transposed) {
  return transposed ? Tensor::stored_transposed(dtype, std::move(shape), device)
                    : Tensor(dtype, std::move(shape), device);
}

// Routing weights as a router gives them: positive, a token's K of order 1 together.
Tensor random_weights(Random& random, DType dtype, std::vector<std::int64_t> shape) {
  Tensor tensor(dtype, std::move(shape));
  for (std::size_t i = 0; i < tensor.count(); ++i) {
    tensor.set(i, static_cast<float>(0.1 + 0.9 * random.uniform()));
  }
  return tensor;
}

void set_index(const Tensor& tensor, std::size_t i, std::int64_t value) {
  if (tensor.dtype() == DType::kInt64) {
    tensor.as<std::int64_t>()[i] = value;
  } else {
    tensor.as<std::int32_t>()[i] = static_cast<std::int32_t>(value);
  }
}

std::int64_t index_at(const Tensor& tensor, std::size_t i) {
  return tensor.dtype() == DType::kInt64 ? tensor.as<std::int64_t>()[i]
                                         : std::int64_t{tensor.as<std::int32_t>()[i]};
}

// -1, the first id past the end (Hugging Face's sentinel), or far out.
std::int64_t dropped_id(Random& random, std::int64_t end) {
  switch (random.integer(0, 2)) {
    case 0:
      return -1;
    case 1:
      return end;
    default:
      return end + 1000;
  }
}

Tensor bytes_tensor(std::size_t bytes, Device device) {
  return Tensor(DType::kUInt8, {static_cast<std::int64_t>(bytes)}, device);
}

const char* name_of_form(Form form) {
  return form == Form::kTopK ? "topk" : form == Form::kSorted ? "sorted" : "pairs";
}

}  // namespace

std::string ExpertsConfig::to_string() const {
  std::string text = name_of_form(form);
  text += " T=" + std::to_string(num_tokens) + " d=" + std::to_string(hidden_size) +
          " n=" + std::to_string(intermediate_size) + " E=" + std::to_string(num_experts);
  if (form == Form::kTopK) text += " K=" + std::to_string(top_k);
  if (form == Form::kPairs) text += " P=" + std::to_string(num_pairs);
  text += " " + std::string(name_of(dtype)) + " " + std::string(name_of(options.activation));
  if (is_gated(options.activation)) text += " " + std::string(name_of(options.gate_up_layout));
  if (biases) text += " biases";
  if (transposed) text += " transposed";
  if (dropped_share > 0.0) text += " dropped";
  if (accumulate) text += " accumulate";
  return text;
}

void ExpertsConfig::fit(Device device) {
  if (device.type != DeviceType::kCuda) return;
  dtype = DType::kBFloat16;
  hidden_size = (hidden_size + 7) / 8 * 8;
  intermediate_size = (intermediate_size + 7) / 8 * 8;
}

Tensor random_topk_ids(Random& random, std::int64_t num_tokens, std::int64_t num_experts,
                       std::int64_t top_k, DType dtype, double dropped_share) {
  Tensor ids(dtype, {num_tokens, top_k});
  std::vector<std::int64_t> experts(static_cast<std::size_t>(num_experts));
  std::iota(experts.begin(), experts.end(), 0);
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    for (std::int64_t k = 0; k < top_k; ++k) {  // the first K steps of a Fisher-Yates shuffle
      std::swap(experts[static_cast<std::size_t>(k)],
                experts[static_cast<std::size_t>(random.integer(k, num_experts - 1))]);
      const bool dropped = dropped_share > 0.0 && random.chance(dropped_share);
      set_index(ids, static_cast<std::size_t>(t * top_k + k),
                dropped ? dropped_id(random, num_experts) : experts[static_cast<std::size_t>(k)]);
    }
  }
  return ids;
}

ExpertsInputs::ExpertsInputs(const ExpertsConfig& configuration, Random& random, Device device)
    : config(configuration) {
  const std::int64_t T = config.num_tokens, d = config.hidden_size;
  const std::int64_t n = config.intermediate_size, E = config.num_experts;
  const std::int64_t columns = gate_factor(config.options.activation) * n;
  const auto scale = [](std::int64_t width) {
    return 1.0 / std::sqrt(static_cast<double>(std::max<std::int64_t>(width, 1)));
  };
  const auto make = [&](DType dtype, std::vector<std::int64_t> extents, double deviation,
                        bool transposed = false) {
    Tensor tensor = make_tensor(dtype, std::move(extents), device, transposed);
    tensor.fill_random(random, deviation);
    return tensor;
  };
  x = make(config.dtype, {T, d}, 1.0);
  w1 = make(config.dtype, {E, columns, d}, scale(d), config.transposed);
  w2 = make(config.dtype, {E, d, n}, scale(n), config.transposed);
  if (config.biases) {
    b1 = make(config.dtype, {E, columns}, 0.5);
    b2 = make(config.dtype, {E, d}, 0.5);
  }
  grad_out = make(config.dtype, {T, d}, 1.0);
  make_routing(random);
  if (config.accumulate) {
    initial_w1 = make(DType::kFloat32, {E, columns, d}, 1.0, config.transposed);
    initial_w2 = make(DType::kFloat32, {E, d, n}, 1.0, config.transposed);
    initial_b1 = make(DType::kFloat32, {E, columns}, 1.0);
    initial_b2 = make(DType::kFloat32, {E, d}, 1.0);
  }
  *this = to(device);  // the routing was made on the host
}

ExpertsInputs ExpertsInputs::to(Device device) const {
  ExpertsInputs copy = *this;
  for (Tensor* tensor :
       {&copy.x, &copy.w1, &copy.b1, &copy.w2, &copy.b2, &copy.topk_ids, &copy.topk_weights,
        &copy.offsets, &copy.token_ids, &copy.expert_ids, &copy.pair_weights, &copy.grad_out,
        &copy.initial_w1, &copy.initial_b1, &copy.initial_w2, &copy.initial_b2}) {
    *tensor = tensor->to(device);
  }
  return copy;
}

void ExpertsInputs::make_routing(Random& random) {
  const std::int64_t T = config.num_tokens, E = config.num_experts;
  if (config.form == Form::kTopK) {
    topk_ids =
        random_topk_ids(random, T, E, config.top_k, config.index_dtype, config.dropped_share);
    topk_weights = random_weights(random, config.weight_dtype, {T, config.top_k});
    return;
  }
  if (config.form == Form::kSorted) {
    // Uneven experts, some empty, and with dropped_share rows past the last end.
    const auto used =
        static_cast<std::int64_t>(static_cast<double>(T) * (1 - config.dropped_share));
    std::vector<std::int32_t> ends;
    for (std::int64_t e = 0; e + 1 < E; ++e) {
      ends.push_back(static_cast<std::int32_t>(random.integer(0, used)));
    }
    ends.push_back(static_cast<std::int32_t>(used));
    std::sort(ends.begin(), ends.end());
    offsets = Tensor(DType::kInt32, {E});
    std::copy(ends.begin(), ends.end(), offsets.as<std::int32_t>());
    if (!config.without_weights) pair_weights = random_weights(random, config.weight_dtype, {T});
    return;
  }
  token_ids = Tensor(config.index_dtype, {config.num_pairs});
  expert_ids = Tensor(config.index_dtype, {config.num_pairs});
  for (std::size_t p = 0; p < token_ids.count(); ++p) {
    const bool drop_token =
        T == 0 || (config.dropped_share > 0 && random.chance(config.dropped_share / 2));
    const bool drop_expert = config.dropped_share > 0 && random.chance(config.dropped_share / 2);
    set_index(token_ids, p, drop_token ? dropped_id(random, T) : random.integer(0, T - 1));
    set_index(expert_ids, p, drop_expert ? dropped_id(random, E) : random.integer(0, E - 1));
  }
  pair_weights = random_weights(random, config.weight_dtype, {config.num_pairs});
}

ExpertsInputs ExpertsInputs::to_float32() const {
  ExpertsInputs copy = to(Device{});
  copy.config.dtype = DType::kFloat32;
  copy.config.weight_dtype = DType::kFloat32;
  for (Tensor* tensor :
       {&copy.x, &copy.w1, &copy.b1, &copy.w2, &copy.b2, &copy.topk_weights, &copy.pair_weights,
        &copy.grad_out, &copy.initial_w1, &copy.initial_b1, &copy.initial_w2, &copy.initial_b2}) {
    *tensor = tensor->to_float32();
  }
  return copy;
}

ExpertWeights ExpertsInputs::weights() const {
  return {w1.view(), b1.view(), w2.view(), b2.view()};
}

Routing ExpertsInputs::routing() const {
  switch (config.form) {
    case Form::kTopK:
      return TopKRouting{topk_ids.view(), topk_weights.view()};
    case Form::kSorted:
      return SortedRouting{offsets.view(), pair_weights.view()};
    case Form::kPairs:
      break;
  }
  return PairRouting{token_ids.view(), expert_ids.view(), pair_weights.view()};
}

MoEShape ExpertsInputs::shape() const {
  return moe_shape(config.options, x.view(), weights(), routing());
}

std::int64_t ExpertsInputs::num_rows() const {
  if (config.form == Form::kSorted) {
    return offsets.to_host().as<std::int32_t>()[config.num_experts - 1];
  }
  const Tensor experts = (config.form == Form::kTopK ? topk_ids : expert_ids).to_host();
  const Tensor tokens = token_ids.to_host();
  std::int64_t rows = 0;
  for (std::size_t p = 0; p < experts.count(); ++p) {
    const std::int64_t e = index_at(experts, p);
    const std::int64_t t = config.form == Form::kTopK ? 0 : index_at(tokens, p);
    if (e >= 0 && e < config.num_experts && t >= 0 && t < config.num_tokens) ++rows;
  }
  return rows;
}

ExpertsRun::ExpertsRun(const Context& context, const ExpertsInputs& inputs,
                       std::optional<std::size_t> workspace_limit)
    : inputs_(&inputs), limit_(workspace_limit) {
  const ExpertsConfig& config = inputs.config;
  const MoEShape shape = inputs.shape();
  forward_plan_ = moe_forward_workspace(context, shape, /*inference=*/false, limit_);
  backward_plan_ = moe_backward_workspace(context, shape, limit_);
  const std::int64_t T = config.num_tokens, d = config.hidden_size;
  const std::int64_t E = config.num_experts, columns = shape.h_columns();
  const Device device = context.device;
  out = Tensor(config.dtype, {T, d}, device);
  h = Tensor(config.dtype, {shape.num_pairs, columns}, device);
  metadata = bytes_tensor(moe_metadata_bytes(shape), device);
  forward_workspace = bytes_tensor(forward_plan_.bytes, device);
  backward_workspace = bytes_tensor(backward_plan_.bytes, device);

  const DType gradient =
      config.float32_gradients || config.accumulate ? DType::kFloat32 : config.dtype;
  const auto weight_gradient = [&](std::vector<std::int64_t> extents) {
    return make_tensor(gradient, std::move(extents), device, config.transposed);
  };
  grad_x = Tensor(config.dtype, {T, d}, device);
  grad_w1 = weight_gradient({E, columns, d});
  grad_w2 = weight_gradient({E, d, config.intermediate_size});
  if (config.biases) {
    grad_b1 = Tensor(gradient, {E, columns}, device);
    grad_b2 = Tensor(gradient, {E, d}, device);
  }
  if (config.form == Form::kTopK) {
    grad_routing_weights = Tensor(DType::kFloat32, {T, config.top_k}, device);
  } else if (inputs.pair_weights.defined()) {
    grad_routing_weights = Tensor(DType::kFloat32, {shape.num_pairs}, device);
  }
  reset_gradients();
}

void ExpertsRun::reset_gradients() {
  if (!inputs_->config.accumulate) return;
  grad_w1.copy_from(inputs_->initial_w1);
  grad_w2.copy_from(inputs_->initial_w2);
  if (!inputs_->config.biases) return;
  grad_b1.copy_from(inputs_->initial_b1);
  grad_b2.copy_from(inputs_->initial_b2);
}

void ExpertsRun::forward(const Context& context) {
  MoEForwardArgs args;
  args.options = inputs_->config.options;
  args.x = inputs_->x.view();
  args.weights = inputs_->weights();
  args.routing = inputs_->routing();
  args.out = out.view();
  args.h = h.view();
  args.metadata = metadata.view();
  args.workspace = forward_workspace.view();
  args.workspace_limit = limit_;
  moe_forward(context, args);
}

void ExpertsRun::backward(const Context& context) {
  MoEBackwardArgs args;
  args.options = inputs_->config.options;
  args.grad_out = inputs_->grad_out.view();
  args.x = inputs_->x.view();
  args.weights = inputs_->weights();
  args.routing = inputs_->routing();
  args.h = h.view();
  args.metadata = metadata.view();
  args.grad_x = grad_x.view();
  args.grad_w1 = grad_w1.view();
  args.grad_b1 = grad_b1.view();
  args.grad_w2 = grad_w2.view();
  args.grad_b2 = grad_b2.view();
  args.grad_routing_weights = grad_routing_weights.view();
  args.accumulate = inputs_->config.accumulate;
  args.workspace = backward_workspace.view();
  args.workspace_limit = limit_;
  moe_backward(context, args);
}

}  // namespace sonicmoe::cli
