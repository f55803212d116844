#include "cli/experts.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace sonicmoe::cli {
namespace {

using Form = MoEShape::Form;

Tensor random_tensor(Random& random, DType dtype, std::vector<std::int64_t> shape, double deviation,
                     bool transposed = false) {
  Tensor tensor = transposed ? Tensor::stored_transposed(dtype, std::move(shape))
                             : Tensor(dtype, std::move(shape));
  tensor.fill_random(random, deviation);
  return tensor;
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

Tensor bytes_tensor(std::size_t bytes) {
  return Tensor(DType::kUInt8, {static_cast<std::int64_t>(bytes)});
}

void copy_values(const Tensor& from, Tensor& to) {
  for (std::size_t i = 0; i < from.count(); ++i) to.set(i, from.at(i));
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

ExpertsInputs::ExpertsInputs(const ExpertsConfig& configuration, Random& random)
    : config(configuration) {
  const std::int64_t T = config.num_tokens, d = config.hidden_size;
  const std::int64_t n = config.intermediate_size, E = config.num_experts;
  const std::int64_t columns = gate_factor(config.options.activation) * n;
  const auto scale = [](std::int64_t width) {
    return 1.0 / std::sqrt(static_cast<double>(std::max<std::int64_t>(width, 1)));
  };
  x = random_tensor(random, config.dtype, {T, d}, 1.0);
  w1 = random_tensor(random, config.dtype, {E, columns, d}, scale(d), config.transposed);
  w2 = random_tensor(random, config.dtype, {E, d, n}, scale(n), config.transposed);
  if (config.biases) {
    b1 = random_tensor(random, config.dtype, {E, columns}, 0.5);
    b2 = random_tensor(random, config.dtype, {E, d}, 0.5);
  }
  grad_out = random_tensor(random, config.dtype, {T, d}, 1.0);
  make_routing(random);
  if (config.accumulate) {
    initial_w1 = random_tensor(random, DType::kFloat32, {E, columns, d}, 1.0, config.transposed);
    initial_w2 = random_tensor(random, DType::kFloat32, {E, d, n}, 1.0, config.transposed);
    initial_b1 = random_tensor(random, DType::kFloat32, {E, columns}, 1.0);
    initial_b2 = random_tensor(random, DType::kFloat32, {E, d}, 1.0);
  }
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
  ExpertsInputs copy;
  copy.config = config;
  copy.config.dtype = DType::kFloat32;
  copy.config.weight_dtype = DType::kFloat32;
  const auto same = [](const Tensor& from) {  // integers: the same values in a copy
    if (!from.defined()) return Tensor();
    Tensor to(from.dtype(), {from.view().shape().begin(), from.view().shape().end()});
    for (std::size_t i = 0; i < from.count(); ++i) set_index(to, i, index_at(from, i));
    return to;
  };
  copy.x = x.to_float32();
  copy.w1 = w1.to_float32();
  copy.b1 = b1.to_float32();
  copy.w2 = w2.to_float32();
  copy.b2 = b2.to_float32();
  copy.topk_ids = same(topk_ids);
  copy.topk_weights = topk_weights.to_float32();
  copy.offsets = same(offsets);
  copy.token_ids = same(token_ids);
  copy.expert_ids = same(expert_ids);
  copy.pair_weights = pair_weights.to_float32();
  copy.grad_out = grad_out.to_float32();
  copy.initial_w1 = initial_w1.to_float32();
  copy.initial_b1 = initial_b1.to_float32();
  copy.initial_w2 = initial_w2.to_float32();
  copy.initial_b2 = initial_b2.to_float32();
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
  if (config.form == Form::kSorted) return offsets.as<std::int32_t>()[config.num_experts - 1];
  const Tensor& experts = config.form == Form::kTopK ? topk_ids : expert_ids;
  std::int64_t rows = 0;
  for (std::size_t p = 0; p < experts.count(); ++p) {
    const std::int64_t e = index_at(experts, p);
    const std::int64_t t = config.form == Form::kTopK ? 0 : index_at(token_ids, p);
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
  const std::int64_t E = config.num_experts, columns = shape.hidden_columns();
  out = Tensor(config.dtype, {T, d});
  h = Tensor(config.dtype, {shape.num_pairs, columns});
  metadata = bytes_tensor(moe_metadata_bytes(shape));
  forward_workspace = bytes_tensor(forward_plan_.bytes);
  backward_workspace = bytes_tensor(backward_plan_.bytes);

  const DType gradient =
      config.float32_gradients || config.accumulate ? DType::kFloat32 : config.dtype;
  const auto weight_gradient = [&](std::vector<std::int64_t> extents) {
    return config.transposed ? Tensor::stored_transposed(gradient, std::move(extents))
                             : Tensor(gradient, std::move(extents));
  };
  grad_x = Tensor(config.dtype, {T, d});
  grad_w1 = weight_gradient({E, columns, d});
  grad_w2 = weight_gradient({E, d, config.intermediate_size});
  if (config.biases) {
    grad_b1 = Tensor(gradient, {E, columns});
    grad_b2 = Tensor(gradient, {E, d});
  }
  if (config.form == Form::kTopK) {
    grad_routing_weights = Tensor(DType::kFloat32, {T, config.top_k});
  } else if (inputs.pair_weights.defined()) {
    grad_routing_weights = Tensor(DType::kFloat32, {shape.num_pairs});
  }
  reset_gradients();
}

void ExpertsRun::reset_gradients() {
  if (!inputs_->config.accumulate) return;
  copy_values(inputs_->initial_w1, grad_w1);
  copy_values(inputs_->initial_w2, grad_w2);
  if (!inputs_->config.biases) return;
  copy_values(inputs_->initial_b1, grad_b1);
  copy_values(inputs_->initial_b2, grad_b2);
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
