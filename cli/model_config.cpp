#include "cli/model_config.hpp"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "cli/parsers.hpp"

namespace sonicmoe::cli {
namespace {

using Names = std::vector<const char*>;
constexpr std::int64_t kMost = (std::int64_t{1} << 31) - 1;

// Of the whole file where no field is at fault.
[[noreturn]] void refuse(const std::string& option, const std::string& expected,
                         const std::string& path) {
  throw usage_error(option, expected, path);
}

class Fields {
 public:
  Fields(const std::string& option, const std::string& path, const nlohmann::json& object)
      : where_(option + ": " + path + ": "), object_(object) {}

  bool has(const char* name) const { return object_.contains(name) && !object_[name].is_null(); }

  bool is_one(const char* name) const { return object_[name] == 1; }

  std::int64_t integer(const Names& names, std::int64_t low) const {
    if (const auto value = maybe_integer(names, low)) return *value;
    std::vector<std::string> all(names.begin(), names.end());
    throw usage_error(where_ + names.front(), expected(low) + " under " + join(all, " or "),
                      "no such field");
  }
  std::int64_t integer(const Names& names, std::int64_t low, std::int64_t otherwise) const {
    return maybe_integer(names, low).value_or(otherwise);
  }
  bool flag(const char* name) const {
    if (!has(name)) return false;
    if (!object_[name].is_boolean()) wrong(name, "true or false");
    return object_[name].get<bool>();
  }
  std::string text(const char* name) const {
    if (!has(name)) return "";
    if (!object_[name].is_string()) wrong(name, "a text");
    return object_[name].get<std::string>();
  }
  /// Layers in a list of their numbers.
  std::set<std::int64_t> layers(const char* name, std::int64_t count) const {
    std::set<std::int64_t> found;
    if (!has(name)) return found;
    const std::string numbers = "a list of layers from 0 to " + std::to_string(count - 1);
    if (!object_[name].is_array()) wrong(name, numbers);
    for (const auto& layer : object_[name]) {
      const bool right = layer.is_number_integer() && layer >= 0 && layer < count;
      if (!right) wrong(name, numbers);
      found.insert(layer.get<std::int64_t>());
    }
    return found;
  }
  /// Layers that a list of kinds does not call "sparse".
  std::int64_t count_dense(const char* name, std::int64_t count) const {
    const std::string kinds = "a list of dense or sparse for " + std::to_string(count) + " layers";
    const nlohmann::json& list = object_[name];
    if (!list.is_array() || static_cast<std::int64_t>(list.size()) != count) wrong(name, kinds);
    std::int64_t dense = 0;
    for (const auto& kind : list) {
      if (kind != "dense" && kind != "sparse") wrong(name, kinds);
      dense += kind == "dense";
    }
    return dense;
  }
  /// That a list, where there is one, has no other kinds of layers.
  void require_layers(const char* name, const std::string& kinds,
                      bool (*right)(const nlohmann::json&)) const {
    if (!has(name)) return;
    if (!object_[name].is_array()) wrong(name, kinds);
    for (const auto& kind : object_[name]) {
      if (!right(kind)) wrong(name, kinds, kind);
    }
  }
  [[noreturn]] void wrong(const char* name, const std::string& what) const {
    wrong(name, what, object_[name]);
  }

 private:
  using Json = nlohmann::json;

  [[noreturn]] void wrong(const char* name, const std::string& what, const Json& value) const {
    const bool nested = value.is_structured();  // maybe deeper than dump() can go
    throw usage_error(
        where_ + name, what,
        nested ? value.type_name() : value.dump(-1, ' ', true, Json::error_handler_t::replace));
  }
  static std::string expected(std::int64_t low) {
    return "an integer from " + std::to_string(low) + " to " + std::to_string(kMost);
  }
  std::optional<std::int64_t> maybe_integer(const Names& names, std::int64_t low) const {
    for (const char* name : names) {
      if (!has(name)) continue;
      const nlohmann::json& value = object_[name];
      if (!value.is_number_integer() || value < low || value > kMost) wrong(name, expected(low));
      return value.get<std::int64_t>();
    }
    return {};
  }

  std::string where_;
  const nlohmann::json& object_;
};

nlohmann::json read_object(const std::string& option, const std::string& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) {
    refuse(option, "a config.json of transformers", path);
  }
  std::ifstream stream(path, std::ios::binary);
  if (!stream) refuse(option, "a file that can be read", path);
  // No exceptions: a file that is no JSON is "discarded".
  nlohmann::json root = nlohmann::json::parse(stream, nullptr, false);
  if (!root.is_object()) refuse(option, "a file with one JSON object", path);
  if (root.contains("text_config") && root["text_config"].is_object()) {
    return nlohmann::json(root["text_config"]);
  }
  return root;
}

AttentionConfig read_attention(const Fields& fields, std::int64_t hidden_size) {
  AttentionConfig a;
  a.heads = fields.integer({"num_attention_heads"}, 1);
  a.key_value_heads = fields.integer({"num_key_value_heads"}, 1, a.heads);
  const std::string type = fields.text("model_type");  // the only place that says so for these
  a.head_norms = type == "qwen3_moe" || type == "olmoe" || fields.flag("use_qk_norm");
  a.key_value_rank = fields.integer({"kv_lora_rank"}, 0, 0);
  if (a.key_value_rank == 0) {
    a.query_width = a.value_width =
        fields.integer({"head_dim"}, 1, std::max<std::int64_t>(1, hidden_size / a.heads));
    return a;
  }
  a.key_value_heads = a.heads;
  a.query_rank = fields.integer({"q_lora_rank"}, 0, 0);
  a.rope_width = fields.integer({"qk_rope_head_dim"}, 0);
  a.query_width = a.rope_width + fields.integer({"qk_nope_head_dim"}, 0);
  a.value_width = fields.integer({"v_head_dim"}, 1);
  return a;
}

bool is_attention(const nlohmann::json& kind) {
  return kind.is_string() && kind != "linear_attention" &&
         kind.get_ref<const std::string&>().ends_with("attention");
}

// What would be counted as if it were attention, or experts in other layers than they are.
void refuse_other_layers(const Fields& fields) {
  for (const char* name : {"mamba_d_state", "mamba_expand", "linear_num_value_heads", "ssm_cfg",
                           "expert_layer_period", "interleave_moe_layer_step"}) {
    if (fields.has(name)) fields.wrong(name, "no such field: layers of attention and experts");
  }
  for (const char* name : {"moe_layer_freq", "moe_layer_interval"}) {
    if (fields.has(name) && !fields.is_one(name)) fields.wrong(name, "1");
  }
  fields.require_layers("layer_types", "a list of kinds of attention, none linear", is_attention);
  fields.require_layers("attn_type_list", "a list of 1, no linear attention",
                        [](const nlohmann::json& kind) { return kind == 1; });
}

// The first layers, those of a list and those between two sparse ones have no experts.
std::int64_t count_dense(const Fields& fields, std::int64_t layers) {
  if (fields.has("mlp_layer_types")) return fields.count_dense("mlp_layer_types", layers);
  const std::int64_t first =
      fields.integer({"first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"}, 0, 0);
  const std::int64_t step = fields.integer({"decoder_sparse_step"}, 1, 1);
  const std::set<std::int64_t> listed = fields.layers("mlp_only_layers", layers);
  std::int64_t count = 0;
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    if (layer < first || (layer + 1) % step != 0 || listed.contains(layer)) ++count;
  }
  return count;
}

}  // namespace

ModelConfig read_model_config(const std::string& option, const std::string& path) {
  const nlohmann::json object = read_object(option, path);
  const Fields fields(option, path, object);
  refuse_other_layers(fields);
  ModelConfig config;
  config.type = fields.text("model_type");
  config.hidden_size = fields.integer({"hidden_size"}, 1);
  config.vocab_size = fields.integer({"vocab_size"}, 1);
  config.tied_embeddings = fields.flag("tie_word_embeddings");
  config.attention = read_attention(fields, config.hidden_size);
  config.num_experts = fields.integer(
      {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}, 1);
  config.top_k = fields.integer({"num_experts_per_tok", "moe_k"}, 1);
  if (config.top_k > config.num_experts) {
    fields.wrong(fields.has("num_experts_per_tok") ? "num_experts_per_tok" : "moe_k",
                 "at most the " + std::to_string(config.num_experts) + " experts of a layer");
  }
  config.expert_width = fields.integer({"moe_intermediate_size", "intermediate_size"}, 1);
  config.dense_width =
      fields.integer({"prefix_dense_intermediate_size", "intermediate_size"}, 0, 0);
  const std::int64_t shared =
      fields.integer({"n_shared_experts", "moe_num_shared_experts", "num_shared_experts"}, 0, 0);
  config.shared_width =
      fields.integer({"shared_expert_intermediate_size", "shared_intermediate_size"}, 0,
                     shared * config.expert_width);
  constexpr std::int64_t kMostLayers = 100000;
  const std::int64_t layers = fields.integer({"num_hidden_layers"}, 1);
  if (layers > kMostLayers) {
    fields.wrong("num_hidden_layers", "at most " + std::to_string(kMostLayers));
  }
  config.dense_layers = count_dense(fields, layers);
  config.moe_layers = layers - config.dense_layers;
  if (config.moe_layers == 0) refuse(option, "a model with experts in some layer", path);
  return config;
}

}  // namespace sonicmoe::cli
