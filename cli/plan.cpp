#include "cli/plan.hpp"

#include <algorithm>
#include <cmath>

#include "sonicmoe/memory.hpp"

namespace sonicmoe::cli {
namespace {

constexpr std::int64_t kGpusOfHost = 8;

double element(const PlanSettings& s) { return static_cast<double>(size_of(s.dtype)); }

double attention_parameters(const ModelConfig& model) {
  const AttentionConfig& a = model.attention;
  const auto d = static_cast<double>(model.hidden_size), h = static_cast<double>(a.heads);
  const auto kv = static_cast<double>(a.key_value_heads);
  const auto query = static_cast<double>(a.query_width), value = static_cast<double>(a.value_width);
  const auto q_rank = static_cast<double>(a.query_rank);
  const auto kv_rank = static_cast<double>(a.key_value_rank);
  const auto rope = static_cast<double>(a.rope_width);
  const double output = h * value * d;
  if (kv_rank == 0) return d * (h * query + kv * (query + value)) + output;
  const double queries = q_rank > 0 ? q_rank * (d + 1 + h * query) : d * h * query;
  return queries + d * (kv_rank + rope) + kv_rank * (1 + h * (query - rope + value)) + output;
}

// The experts of one rank, as one call sees them: the tokens of all ranks that exchange.
MoEShape rank_shape(const ModelConfig& model, const Layout& layout, const PlanSettings& s) {
  MoEShape shape;
  shape.num_tokens = s.tokens * layout.ep;
  shape.hidden_size = model.hidden_size;
  shape.intermediate_size = model.expert_width;
  shape.num_experts = model.num_experts / layout.ep;
  shape.num_pairs = shape.num_tokens * model.top_k;
  if (layout.ep > 1) shape.max_rows = s.tokens * model.top_k;  // of balanced experts
  shape.activation = s.activation;
  shape.numerics = Numerics::of(s.dtype);
  return shape;
}

// Of an RMSNorm, for each number, as transformers computes it: its input in float32 and what it
// multiplies with the weight.
double norm_kept(const PlanSettings& s) { return 4 + element(s); }

// Of attention and norms from forward to backward, for one token; X of what follows included.
double attention_kept(const ModelConfig& model, const PlanSettings& s) {
  const AttentionConfig& a = model.attention;
  const auto d = static_cast<double>(model.hidden_size), h = static_cast<double>(a.heads);
  const auto kv = static_cast<double>(a.key_value_heads);
  const auto query = static_cast<double>(a.query_width), value = static_cast<double>(a.value_width);
  const double m = element(s);
  const double norms = 2 * (d * (norm_kept(s) + m) + 4);  // with what products read of them
  const double head_norms = a.head_norms ? (h + kv) * query * norm_kept(s) : 0;
  const double latent = static_cast<double>(a.query_rank + a.key_value_rank) * (norm_kept(s) + m);
  // Of MLA a value is a view of the projection that keys are cut from too.
  const double values =
      a.key_value_rank > 0 ? value + query - static_cast<double>(a.rope_width) : value;
  return norms + head_norms + latent + m * (h * (query + value) + kv * (query + values)) + 4 * h;
}

// Of a gated MLP: gate, activation, up and their product.
double mlp_kept(std::int64_t width, const PlanSettings& s) {
  const int gate = gate_factor(s.activation);
  return (gate == 2 ? 4.0 : 2.0) * static_cast<double>(width) * element(s);
}

// Of one layer from forward to backward.
double moe_layer_kept(const ModelConfig& model, const Layout& layout, const PlanSettings& s) {
  const auto tokens = static_cast<double>(s.tokens);
  const auto ep = static_cast<double>(layout.ep), d = static_cast<double>(model.hidden_size);
  const MemoryEstimate experts = estimate_memory(rank_shape(model, layout, s));
  const double logits = 4 * static_cast<double>(model.num_experts);
  const double received = layout.ep > 1 ? ep * d * element(s) : 0;  // the gathered tokens
  return static_cast<double>(experts.kept()) +
         tokens * (attention_kept(model, s) + mlp_kept(model.shared_width, s) + logits + received);
}

double dense_layer_kept(const ModelConfig& model, const PlanSettings& s) {
  return static_cast<double>(s.tokens) *
         (attention_kept(model, s) + mlp_kept(model.dense_width, s));
}

double all_kept(const ModelConfig& model, const Layout& layout, const PlanSettings& s) {
  const double moe = moe_layer_kept(model, layout, s), dense = dense_layer_kept(model, s);
  const auto moes = static_cast<double>(model.moe_layers);
  const auto denses = static_cast<double>(model.dense_layers);
  const auto d = static_cast<double>(model.hidden_size);
  const double inputs = static_cast<double>(s.tokens) * d * element(s);
  const double last = static_cast<double>(s.tokens) * d * (norm_kept(s) + element(s));
  if (!s.checkpointing) return moes * moe + denses * dense + last;
  return last + (moes + denses) * inputs + std::max(moe, denses > 0 ? dense : 0.0);
}

// Of a layer in backward: its weights, those of the next one on their way, its gradients in the
// dtype of the products, and in float32 those of the one before, which are being reduced.
double gathered_bytes(double parameters, const PlanSettings& s) {
  return parameters * (3 * element(s) + 4);
}

double per_second(std::int64_t ranks, const PlanSettings& s) {
  return 1e9 * (ranks <= kGpusOfHost ? s.nvlink : s.network);
}

// What a rank receives of a buffer that lies on so many ranks in equal parts.
double remote_share(std::int64_t ranks) { return 1.0 - 1.0 / static_cast<double>(ranks); }

// HSDP: a rank's float32 gradients, reduced over the copies of the model and gathered again.
double copies_bytes(const ParameterCount& count, const Layout& layout) {
  const double own = (count.moe_layer + count.experts) / static_cast<double>(layout.fsdp);
  return 4 * own * 2 * remote_share(layout.gpus / layout.fsdp);
}

}  // namespace

ParameterCount count_parameters(const ModelConfig& model, Activation activation) {
  const auto d = static_cast<double>(model.hidden_size);
  const auto E = static_cast<double>(model.num_experts), K = static_cast<double>(model.top_k);
  const double of_width = (gate_factor(activation) + 1) * d;  // of an MLP, per column
  const double expert = of_width * static_cast<double>(model.expert_width);
  const double around = attention_parameters(model) + 2 * d;
  const double vocabulary = static_cast<double>(model.vocab_size) * d;
  const auto moes = static_cast<double>(model.moe_layers);
  const auto denses = static_cast<double>(model.dense_layers);
  ParameterCount count;
  count.experts = E * expert;
  count.moe_layer = around + E * d + of_width * static_cast<double>(model.shared_width);
  count.dense_layer = around + of_width * static_cast<double>(model.dense_width);
  count.embedding = vocabulary * (model.tied_embeddings ? 1 : 2) + d;
  const double layers = moes * count.moe_layer + denses * count.dense_layer;
  count.total = moes * count.experts + layers + count.embedding;
  count.active = moes * K * expert + layers - 2 * d * (moes + denses) + vocabulary;
  return count;
}

double RankMemory::total() const {
  return parameters + gradients + optimizer + kept + root +
         std::max(gathered + scratch + exchange, loss);
}

RankMemory memory_of_rank(const ModelConfig& model, const Layout& layout, const PlanSettings& s) {
  const ParameterCount count = count_parameters(model, s.activation);
  const double own = count.total / static_cast<double>(layout.fsdp);
  const auto ep = static_cast<double>(layout.ep), tokens = static_cast<double>(s.tokens);
  const double m = element(s), x = tokens * static_cast<double>(model.hidden_size) * m;
  const MemoryEstimate experts = estimate_memory(rank_shape(model, layout, s), s.workspace_limit);
  const double moe_layer = count.moe_layer + count.experts / ep;
  RankMemory memory;
  memory.parameters = memory.gradients = own * static_cast<double>(size_of(s.parameter_dtype));
  memory.optimizer = own * s.optimizer_bytes;
  memory.kept = all_kept(model, layout, s);
  memory.root = 2 * m * count.embedding;
  memory.gathered =
      gathered_bytes(std::max(moe_layer, model.dense_layers > 0 ? count.dense_layer : 0), s);
  memory.scratch = std::max(static_cast<double>(experts.transient_forward) + x,
                            static_cast<double>(experts.transient_backward) + 2 * x);
  // Gradients of all tokens come in, partial ones of x are computed and change hands.
  memory.exchange = layout.ep > 1 ? 3 * ep * x : 0;
  const double alive =
      static_cast<double>(s.loss_tokens > 0 ? std::min(s.loss_tokens, s.tokens) : s.tokens);
  memory.loss = alive * static_cast<double>(model.vocab_size) * 12;
  return memory;
}

double Traffic::visible() const {
  return tokens_over_compute() + std::max(0.0, weights_over_compute() - 1.0);
}

Traffic traffic_of_layer(const ModelConfig& model, const Layout& layout, const PlanSettings& s) {
  const ParameterCount count = count_parameters(model, s.activation);
  const auto tokens = static_cast<double>(s.tokens), ep = static_cast<double>(layout.ep);
  const auto d = static_cast<double>(model.hidden_size), K = static_cast<double>(model.top_k);
  const double per_parameter = 2 * element(s) + 4;  // gathered twice, reduced in float32
  Traffic traffic;
  const double of_shards =
      per_parameter * (count.experts / ep * remote_share(layout.expert_shards()) +
                       count.moe_layer * remote_share(layout.fsdp));
  const double of_copies = copies_bytes(count, layout);
  traffic.weight_bytes = of_shards + of_copies;
  const double exchanges = s.checkpointing ? 6 : 4;  // of rows: two each way, and again
  traffic.token_bytes = exchanges * (ep - 1) * tokens * d * element(s);
  traffic.weight_seconds =
      of_shards / per_second(layout.fsdp, s) + of_copies / per_second(layout.gpus, s);
  traffic.token_seconds = traffic.token_bytes / per_second(layout.ep, s);
  const double active =
      count.moe_layer - 2 * d + K * count.experts / static_cast<double>(model.num_experts);
  const double passes = s.checkpointing ? 4 : 3;  // backward is two
  traffic.compute_seconds = passes * 2 * tokens * active / (s.tflops * 1e12);
  return traffic;
}

std::vector<Layout> layouts_of(const ModelConfig& model, std::int64_t gpus, std::int64_t fsdp) {
  std::vector<Layout> layouts;
  for (std::int64_t ep = 1; ep <= std::min(fsdp, model.num_experts); ++ep) {
    if (fsdp % ep == 0 && model.num_experts % ep == 0) layouts.push_back({gpus, fsdp, ep});
  }
  return layouts;
}

}  // namespace sonicmoe::cli
