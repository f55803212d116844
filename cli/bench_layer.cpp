#include "cli/bench_layer.hpp"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "cli/check.hpp"
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
  shape.dtype = dtype;
  return shape;
}

// One (token, slot) of a top-K problem, and the row of H that holds it.
struct Slot {
  std::int64_t token, slot, expert, row;
};

// Every slot in the order of H: by expert, stably.
std::vector<Slot> slots_in_row_order(const ExpertsInputs& inputs) {
  const std::int64_t K = inputs.config.top_k;
  std::vector<Slot> slots;
  for (std::int64_t p = 0; p < inputs.config.num_tokens * K; ++p) {
    slots.push_back({p / K, p % K, inputs.topk_ids.as<std::int32_t>()[p], 0});
  }
  std::stable_sort(slots.begin(), slots.end(),
                   [](const Slot& a, const Slot& b) { return a.expert < b.expert; });
  for (std::size_t r = 0; r < slots.size(); ++r) slots[r].row = static_cast<std::int64_t>(r);
  return slots;
}

std::int64_t place_of(const std::vector<std::int64_t>& sorted, std::int64_t value) {
  return std::lower_bound(sorted.begin(), sorted.end(), value) - sorted.begin();
}

void copy_block(const Tensor& from, std::int64_t from_block, Tensor& to, std::int64_t to_block) {
  const auto size = static_cast<std::size_t>(to.view().numel() / to.view().size(0));
  for (std::size_t i = 0; i < size; ++i) {
    to.set(static_cast<std::size_t>(to_block) * size + i,
           from.at(static_cast<std::size_t>(from_block) * size + i));
  }
}

// The selected rows as a float32 problem of their own: a pair list over the tokens and experts that
// occur, renumbered. Both lists are ascending, so that rows keep their order.
struct Part {
  std::vector<std::int64_t> tokens, experts;
  ExpertsInputs inputs;

  static std::vector<std::int64_t> distinct(const std::vector<Slot>& slots,
                                            std::int64_t Slot::* id) {
    std::vector<std::int64_t> values;
    for (const Slot& slot : slots) values.push_back(slot.*id);
    std::sort(values.begin(), values.end());
    values.erase(std::unique(values.begin(), values.end()), values.end());
    return values;
  }

  ExpertsConfig config(const ExpertsConfig& whole, std::size_t pairs) const {
    ExpertsConfig part = whole;
    part.form = MoEShape::Form::kPairs;
    part.dtype = DType::kFloat32;
    part.num_tokens = static_cast<std::int64_t>(tokens.size());
    part.num_experts = static_cast<std::int64_t>(experts.size());
    part.num_pairs = static_cast<std::int64_t>(pairs);
    return part;
  }

  // The random values that the inputs are made with are all overwritten.
  Part(const ExpertsInputs& whole, const std::vector<Slot>& slots, Random random = Random(0))
      : tokens(distinct(slots, &Slot::token)),
        experts(distinct(slots, &Slot::expert)),
        inputs(config(whole.config, slots.size()), random) {
    for (std::size_t t = 0; t < tokens.size(); ++t) {
      copy_block(whole.x, tokens[t], inputs.x, static_cast<std::int64_t>(t));
      copy_block(whole.grad_out, tokens[t], inputs.grad_out, static_cast<std::int64_t>(t));
    }
    for (std::size_t e = 0; e < experts.size(); ++e) {
      copy_block(whole.w1, experts[e], inputs.w1, static_cast<std::int64_t>(e));
      copy_block(whole.w2, experts[e], inputs.w2, static_cast<std::int64_t>(e));
    }
    for (std::size_t p = 0; p < slots.size(); ++p) {
      const Slot& slot = slots[p];
      inputs.token_ids.as<std::int32_t>()[p] =
          static_cast<std::int32_t>(place_of(tokens, slot.token));
      inputs.expert_ids.as<std::int32_t>()[p] =
          static_cast<std::int32_t>(place_of(experts, slot.expert));
      const std::int64_t from = slot.token * whole.config.top_k + slot.slot;
      inputs.pair_weights.set(p, whole.topk_weights.at(static_cast<std::size_t>(from)));
    }
  }
};

// Sums over d, n and rows are longer here than in `check`.
Tolerance bench_tolerance(DType dtype) {
  const Tolerance tolerance = Tolerance::of(dtype);
  return {4 * tolerance.max, 4 * tolerance.rms};
}

// The rows of the expert that has the fewest, but some.
std::vector<Slot> smallest_expert(const std::vector<Slot>& slots, std::int64_t num_experts) {
  std::vector<std::int64_t> rows(static_cast<std::size_t>(num_experts), 0);
  for (const Slot& slot : slots) ++rows[static_cast<std::size_t>(slot.expert)];
  std::int64_t smallest = slots.front().expert;
  for (const Slot& slot : slots) {
    if (rows[static_cast<std::size_t>(slot.expert)] < rows[static_cast<std::size_t>(smallest)]) {
      smallest = slot.expert;
    }
  }
  std::vector<Slot> result;
  std::copy_if(slots.begin(), slots.end(), std::back_inserter(result),
               [&](const Slot& slot) { return slot.expert == smallest; });
  return result;
}

}  // namespace

BenchLayer::BenchLayer(const Context& context, const LayerShape& shape, DType dtype,
                       const LayerOptions& options, Random& random)
    : options_(options),
      inputs_(config_of(shape, dtype, options), random),
      shape_(inputs_.shape()),
      run_(context, inputs_, options.with_router ? std::nullopt : options.workspace_limit) {
  if (!options.with_router) return;
  layer_options_.experts = inputs_.config.options;
  layer_options_.router.top_k = shape.top_k;
  layer_options_.router.scoring = Scoring::kTopKSoftmax;
  router_weight_ = Tensor(dtype, {shape.num_experts, shape.hidden_size});
  router_weight_.fill_random(random, 1.0 / std::sqrt(static_cast<double>(shape.hidden_size)));
  grad_router_weight_ = Tensor(dtype, {shape.num_experts, shape.hidden_size});
  logits_ = Tensor(DType::kFloat32, {shape.num_tokens, shape.num_experts});
  rows_per_expert_ = Tensor(DType::kInt32, {shape.num_experts});
  const auto workspace = [&](const WorkspacePlan& plan) {
    return Tensor(DType::kUInt8, {static_cast<std::int64_t>(plan.bytes)});
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
  args.saved.pair_weights = inputs_.topk_weights.view();
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
  args.saved.pair_weights = inputs_.topk_weights.view();
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

namespace {

// The part's results on the reference, with the H that `run` stored.
std::unique_ptr<ExpertsRun> reference_run(const Part& part, const std::vector<Slot>& slots,
                                          const ExpertsRun& run) {
  const Context reference = reference_context();
  auto expected = std::make_unique<ExpertsRun>(reference, part.inputs);
  expected->forward(reference);
  const auto columns = static_cast<std::size_t>(run.h.view().size(1));
  for (std::size_t r = 0; r < slots.size(); ++r) {
    for (std::size_t c = 0; c < columns; ++c) {
      expected->h.set(r * columns + c,
                      run.h.at(static_cast<std::size_t>(slots[r].row) * columns + c));
    }
  }
  expected->backward(reference);
  return expected;
}

// Rows `ids` of a matrix, or blocks of a cube.
Tensor blocks_of(const Tensor& whole, const std::vector<std::int64_t>& ids) {
  std::vector<std::int64_t> extents(whole.view().shape().begin(), whole.view().shape().end());
  extents[0] = static_cast<std::int64_t>(ids.size());
  Tensor blocks(DType::kFloat32, extents);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    copy_block(whole, ids[i], blocks, static_cast<std::int64_t>(i));
  }
  return blocks;
}

// Adds the router's share to dX of the tokens of `part`: dLogits Wr, with softmax over the chosen
// logits, whose values are the pairs' weights s: dLogit = s (dS - sum s dS).
void add_router_share(const Part& part, const std::vector<Slot>& slots, const Tensor& router_weight,
                      ExpertsRun& run) {
  const Tensor& s = part.inputs.pair_weights;
  const Tensor& ds = run.grad_routing_weights;
  const auto d = static_cast<std::size_t>(run.grad_x.view().size(1));
  for (std::size_t i = 0; i < part.tokens.size(); ++i) {
    float mean = 0.0f;
    for (std::size_t p = 0; p < slots.size(); ++p) {
      if (slots[p].token == part.tokens[i]) mean += s.at(p) * ds.at(p);
    }
    for (std::size_t p = 0; p < slots.size(); ++p) {
      if (slots[p].token != part.tokens[i]) continue;
      const float grad_logit = s.at(p) * (ds.at(p) - mean);
      const auto row = static_cast<std::size_t>(slots[p].expert) * d;
      for (std::size_t c = 0; c < d; ++c) {
        run.grad_x.set(i * d + c,
                       run.grad_x.at(i * d + c) + grad_logit * router_weight.at(row + c));
      }
    }
  }
}

}  // namespace

void BenchLayer::check() const {
  const std::vector<Slot> slots = slots_in_row_order(inputs_);
  const std::int64_t T = inputs_.config.num_tokens;
  const Tolerance tolerance = bench_tolerance(inputs_.config.dtype);
  Findings findings;

  // The first, a middle and the last token with all their experts.
  const std::vector<std::int64_t> sample{0, T / 2, T - 1};
  std::vector<Slot> of_tokens;
  std::copy_if(slots.begin(), slots.end(), std::back_inserter(of_tokens), [&](const Slot& slot) {
    return std::find(sample.begin(), sample.end(), slot.token) != sample.end();
  });
  const Part tokens(inputs_, of_tokens);
  const auto by_token = reference_run(tokens, of_tokens, run_);
  findings.compare("out", blocks_of(run_.out, tokens.tokens), by_token->out, tolerance);
  if (options_.with_router) add_router_share(tokens, of_tokens, router_weight_, *by_token);
  findings.compare("grad_x", blocks_of(run_.grad_x, tokens.tokens), by_token->grad_x, tolerance);
  if (!options_.with_router) {  // a layer does not hand out d(weights)
    Tensor grad_weights(DType::kFloat32, {static_cast<std::int64_t>(of_tokens.size())});
    for (std::size_t p = 0; p < of_tokens.size(); ++p) {
      const Slot& slot = of_tokens[p];
      const std::int64_t from = slot.token * inputs_.config.top_k + slot.slot;
      grad_weights.set(p, run_.grad_routing_weights.at(static_cast<std::size_t>(from)));
    }
    findings.compare("grad_routing_weights", grad_weights, by_token->grad_routing_weights,
                     tolerance);
  }

  // All rows of the expert with the fewest (but some).
  const std::vector<Slot> of_expert = smallest_expert(slots, inputs_.config.num_experts);
  const Part expert(inputs_, of_expert);
  const auto by_expert = reference_run(expert, of_expert, run_);
  findings.compare("grad_w1", blocks_of(run_.grad_w1, expert.experts), by_expert->grad_w1,
                   tolerance);
  findings.compare("grad_w2", blocks_of(run_.grad_w2, expert.experts), by_expert->grad_w2,
                   tolerance);
  if (!findings.passed()) throw CheckFailed(findings.problems().front());
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

std::size_t BenchLayer::sets_to_rotate(std::size_t bytes_of_one) {
  constexpr std::size_t kMostSets = 8;
  std::size_t cache = std::size_t{64} << 20;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  if (const long size = sysconf(_SC_LEVEL3_CACHE_SIZE); size > 0) {
    cache = static_cast<std::size_t>(size);
  }
#endif
  return std::clamp<std::size_t>(cache / std::max<std::size_t>(bytes_of_one, 1) + 1, 1, kMostSets);
}

}  // namespace sonicmoe::cli
