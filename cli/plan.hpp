// What a model takes of every GPU before it runs on several, and what its ranks exchange. Formulas:
// docs/ops/memory.md, "A plan of a whole model".
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "cli/model_config.hpp"
#include "sonicmoe/moe.hpp"

namespace sonicmoe::cli {

/// One copy of the model lies on `fsdp` of the `gpus`. Experts are spread over `ep` of these and
/// sharded over the other fsdp / ep; all else is sharded over all of them.
struct Layout {
  std::int64_t gpus = 1;
  std::int64_t fsdp = 1;
  std::int64_t ep = 1;
  std::int64_t expert_shards() const { return fsdp / ep; }
};

struct PlanSettings {
  std::int64_t tokens = 8192;  ///< of a rank and microbatch
  DType dtype = DType::kBFloat16;
  Activation activation = Activation::kSwiGLU;
  std::optional<std::size_t> workspace_limit;
  DType parameter_dtype = DType::kFloat32;  ///< of the shards of parameters and gradients
  double optimizer_bytes = 8;               ///< per parameter
  std::int64_t loss_tokens = 0;             ///< whose logits exist at a time; 0: all
  bool checkpointing = false;               ///< of every layer
  double tflops = 500;                      ///< of a GPU
  double nvlink = 240;                      ///< GB/s of a collective within a host
  double network = 45;                      ///< GB/s of a GPU between hosts
};

/// Numbers of parameters. Biases, and norms of single heads, are not counted.
struct ParameterCount {
  double experts = 0;    ///< of one layer
  double moe_layer = 0;  ///< of one layer with experts, without these
  double dense_layer = 0;
  double embedding = 0;  ///< with head and last norm
  double total = 0;
  double active = 0;  ///< in products for one token: no embedding, top_k experts
};
ParameterCount count_parameters(const ModelConfig& model, Activation activation);

/// Bytes of one rank at the largest moment of a step.
struct RankMemory {
  double parameters = 0, gradients = 0, optimizer = 0;  ///< shards, all the time
  double kept = 0;                                      ///< by all layers for backward
  double root = 0;      ///< gathered embedding and head, and their gradients
  double gathered = 0;  ///< weights and gradients of the layer in backward and of its neighbours
  double scratch = 0;   ///< of that layer: the larger of forward and backward
  double exchange = 0;  ///< of that layer: tokens of other ranks and their partial rows
  double loss = 0;      ///< logits and their gradients, while nothing of a layer is there
  double total() const;
};
RankMemory memory_of_rank(const ModelConfig& model, const Layout& layout,
                          const PlanSettings& settings);

/// Of a layer with experts and a microbatch, forward and backward, for each rank.
struct Traffic {
  double weight_bytes = 0;  ///< FSDP: two gathers and a reduction; HSDP: also an all-reduce
  double token_bytes = 0;   ///< expert parallelism
  double weight_seconds = 0, token_seconds = 0, compute_seconds = 0;
  double weights_over_compute() const { return weight_seconds / compute_seconds; }
  double tokens_over_compute() const { return token_seconds / compute_seconds; }
  /// Of compute: tokens travel while nothing else runs, weights beside the products.
  double visible() const;
};
Traffic traffic_of_layer(const ModelConfig& model, const Layout& layout,
                         const PlanSettings& settings);

/// With every ep that divides both fsdp and the experts, rising.
std::vector<Layout> layouts_of(const ModelConfig& model, std::int64_t gpus, std::int64_t fsdp);

}  // namespace sonicmoe::cli
