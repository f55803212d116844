// The sizes of a model of transformers, from its config.json.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sonicmoe::cli {

/// Widths of attention; those of a query and a key head differ from a value's under multi-head
/// latent attention, whose ranks are 0 elsewhere.
struct AttentionConfig {
  std::int64_t heads = 0;
  std::int64_t key_value_heads = 0;
  std::int64_t query_width = 0;  ///< of one head, as the key's
  std::int64_t value_width = 0;
  std::int64_t rope_width = 0;      ///< MLA: of the one key head that rotates
  std::int64_t query_rank = 0;      ///< MLA: q_lora_rank, 0 where queries are projected at once
  std::int64_t key_value_rank = 0;  ///< MLA: kv_lora_rank
  bool head_norms = false;          ///< queries and keys are normalised
};

struct ModelConfig {
  std::string type;  ///< model_type, "" where the file has none
  std::int64_t hidden_size = 0;
  std::int64_t vocab_size = 0;
  bool tied_embeddings = false;
  AttentionConfig attention;
  std::int64_t dense_layers = 0;  ///< without experts
  std::int64_t dense_width = 0;
  std::int64_t moe_layers = 0;
  std::int64_t num_experts = 0;
  std::int64_t top_k = 0;
  std::int64_t expert_width = 0;
  std::int64_t shared_width = 0;  ///< of all shared experts of a layer together
};

/// Reads the file that `option` names. A field has the first of its names that the file has; null
/// is the same as missing. text_config stands for the whole where there is one.
/// Errors, which name option, file and field: no regular file, no JSON object, a field that is
/// missing or no integer of its range, more experts per token than experts, no layer with experts;
/// layers of another kind than attention.
ModelConfig read_model_config(const std::string& option, const std::string& path);

}  // namespace sonicmoe::cli
