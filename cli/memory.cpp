// sonicmoe memory: what a layer keeps and needs for a moment, beside ScatterMoE, and the tokens
// that fit a GPU.
#include "sonicmoe/memory.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "cli/command.hpp"
#include "cli/options.hpp"
#include "cli/table.hpp"

namespace sonicmoe::cli {
namespace {

struct MemoryCommand {
  std::string shape = "32768,2048,1024,64,8";
  std::string dtype = "bfloat16";
  std::string activation = "swiglu";
  std::string workspace_limit;
  std::string gpu;
  std::int64_t layers = 1;
  double parameter_bytes = 0.0;  // per parameter; 0: weight and gradient in the dtype
  std::string other;             // bytes of the rest of the model that do not grow with the tokens
  double other_per_token = 0.0;  // bytes
  bool json = false;
};

struct Gpu {
  const char* name;
  double gib;  // what the driver reports as total, rounded down
};
constexpr std::array<Gpu, 4> kGpus{
    {{"a100-40gb", 39.0}, {"a100-80gb", 79.0}, {"h100-80gb", 79.0}, {"h200", 139.0}}};

std::size_t gpu_bytes(const std::string& text) {
  std::string known;
  for (const Gpu& gpu : kGpus) {
    if (text == gpu.name) return static_cast<std::size_t>(gpu.gib * 1024 * 1024 * 1024);
    known += std::string(gpu.name) + ", ";
  }
  try {
    return parse_bytes("--gpu", text);
  } catch (const Error&) {
    throw usage_error("--gpu", known + "or bytes such as 24GiB", text);
  }
}

// Everything of one implementation at one number of tokens, in bytes.
struct Footprint {
  MemoryEstimate layer;           // of one layer
  std::size_t input = 0;          // X of one layer, kept for backward by everybody
  std::size_t parameters = 0;     // of one layer: weights, gradients, optimizer state
  std::size_t peak_forward = 0;   // transients plus O
  std::size_t peak_backward = 0;  // transients plus dO and dX
  std::size_t other = 0;          // of the whole model

  std::size_t total(std::int64_t layers) const {
    return static_cast<std::size_t>(layers) * (parameters + input + layer.kept()) +
           std::max(peak_forward, peak_backward) + other;
  }
};

class Model {
 public:
  explicit Model(const MemoryCommand& command) : layers_(command.layers) {
    if (command.layers < 1 || command.layers > 100000) {
      throw usage_error("--layers", "1 to 100000", std::to_string(command.layers));
    }
    shape_ = parse_layer_shape(command.shape);
    dtype_ = parse_float_dtype(command.dtype);
    activation_ = activation_from_name(command.activation);
    if (!command.workspace_limit.empty()) {
      limit_ = parse_bytes("--workspace-limit", command.workspace_limit);
    }
    if (command.parameter_bytes < 0.0) {
      throw usage_error("--parameter-bytes", "a number >= 0",
                        std::to_string(command.parameter_bytes));
    }
    if (!command.other.empty()) other_ = parse_bytes("--other-bytes", command.other);
    if (command.other_per_token < 0.0) {
      throw usage_error("--other-bytes-per-token", "a number >= 0",
                        std::to_string(command.other_per_token));
    }
    other_per_token_ = command.other_per_token;
    parameter_bytes_ = command.parameter_bytes > 0.0 ? command.parameter_bytes
                                                     : 2.0 * static_cast<double>(size_of(dtype_));
  }

  MoEShape shape(std::int64_t tokens) const {
    MoEShape shape;
    shape.num_tokens = tokens;
    shape.hidden_size = shape_.hidden_size;
    shape.intermediate_size = shape_.intermediate_size;
    shape.num_experts = shape_.num_experts;
    shape.num_pairs = tokens * shape_.top_k;
    shape.activation = activation_;
    shape.dtype = dtype_;
    return shape;
  }

  Footprint ours(std::int64_t tokens) const {
    return footprint(tokens, estimate_memory(shape(tokens), limit_));
  }
  Footprint scattermoe(std::int64_t tokens) const {
    return footprint(tokens, estimate_memory_scattermoe(shape(tokens)));
  }

  /// The most tokens whose total is within `bytes`; 0 when the parameters alone do not fit.
  std::int64_t tokens_that_fit(std::size_t bytes, bool scattermoe_formula) const {
    const auto fits = [&](std::int64_t tokens) {
      const Footprint f = scattermoe_formula ? scattermoe(tokens) : ours(tokens);
      return f.total(layers_) <= bytes;
    };
    std::int64_t low = 0;  // fits, or nothing does
    std::int64_t high = std::int64_t{1} << 28;
    while (high - low > 1) {
      const std::int64_t middle = low + (high - low) / 2;
      (fits(middle) ? low : high) = middle;
    }
    return low;
  }

  const LayerShape& layer_shape() const { return shape_; }
  std::int64_t layers() const { return layers_; }
  DType dtype() const { return dtype_; }
  Activation activation() const { return activation_; }

 private:
  Footprint footprint(std::int64_t tokens, const MemoryEstimate& estimate) const {
    const MoEShape s = shape(tokens);
    const auto x = static_cast<std::size_t>(tokens * s.hidden_size) * size_of(dtype_);
    const double parameters =
        static_cast<double>(sonicmoe::parameter_bytes(s)) / static_cast<double>(size_of(dtype_));
    return {estimate,
            x,
            static_cast<std::size_t>(parameters * parameter_bytes_),
            estimate.transient_forward + x,
            estimate.transient_backward + 2 * x,
            other_ + static_cast<std::size_t>(other_per_token_ * static_cast<double>(tokens))};
  }

  LayerShape shape_;
  std::int64_t layers_;
  DType dtype_ = DType::kBFloat16;
  Activation activation_ = Activation::kSwiGLU;
  std::optional<std::size_t> limit_;
  double parameter_bytes_ = 0.0;
  std::size_t other_ = 0;
  double other_per_token_ = 0.0;
};

nlohmann::ordered_json to_json(const Footprint& f, std::int64_t layers) {
  return {{"kept_h_bytes", f.layer.kept_h},
          {"kept_metadata_bytes", f.layer.kept_metadata},
          {"kept_bytes", f.layer.kept()},
          {"kept_bytes_all_layers", f.layer.kept() * static_cast<std::size_t>(layers)},
          {"transient_forward_bytes", f.layer.transient_forward},
          {"transient_backward_bytes", f.layer.transient_backward},
          {"input_bytes", f.input},
          {"parameter_bytes", f.parameters},
          {"other_bytes", f.other},
          {"total_bytes_all_layers", f.total(layers)}};
}

void print_json(const Model& model, std::optional<std::size_t> gpu) {
  const std::int64_t tokens = model.layer_shape().num_tokens;
  nlohmann::ordered_json root;
  root["shape"] = model.layer_shape().to_string();
  root["dtype"] = name_of(model.dtype());
  root["activation"] = name_of(model.activation());
  root["layers"] = model.layers();
  root["sonicmoe"] = to_json(model.ours(tokens), model.layers());
  root["scattermoe"] = to_json(model.scattermoe(tokens), model.layers());
  if (gpu) {
    root["gpu_bytes"] = *gpu;
    root["sonicmoe"]["tokens_that_fit"] = model.tokens_that_fit(*gpu, false);
    root["scattermoe"]["tokens_that_fit"] = model.tokens_that_fit(*gpu, true);
  }
  std::printf("%s\n", root.dump(2).c_str());
}

void print_text(const Model& model, std::optional<std::size_t> gpu) {
  const LayerShape& shape = model.layer_shape();
  const auto layers = static_cast<std::size_t>(model.layers());
  const Footprint ours = model.ours(shape.num_tokens);
  const Footprint scatter = model.scattermoe(shape.num_tokens);
  std::printf("T=%lld d=%lld n=%lld E=%lld K=%lld %s %s, %zu layer%s\n\n",
              static_cast<long long>(shape.num_tokens), static_cast<long long>(shape.hidden_size),
              static_cast<long long>(shape.intermediate_size),
              static_cast<long long>(shape.num_experts), static_cast<long long>(shape.top_k),
              std::string(name_of(model.dtype())).c_str(),
              std::string(name_of(model.activation())).c_str(), layers, layers == 1 ? "" : "s");

  Table table({"", "sonicmoe", "ScatterMoE", "ratio"});
  const auto add = [&](const char* name, std::size_t a, std::size_t b) {
    const double ratio = a == 0 ? 0.0 : static_cast<double>(b) / static_cast<double>(a);
    table.add_row({name, format_bytes(static_cast<double>(a)), format_bytes(static_cast<double>(b)),
                   a == 0 ? "-" : format_fixed(ratio, 2)});
  };
  add("kept, one layer", ours.layer.kept(), scatter.layer.kept());
  add("  activations", ours.layer.kept_h, scatter.layer.kept_h);
  add("  routing", ours.layer.kept_metadata, scatter.layer.kept_metadata);
  add("kept, all layers", layers * ours.layer.kept(), layers * scatter.layer.kept());
  add("transient, forward", ours.layer.transient_forward, scatter.layer.transient_forward);
  add("transient, backward", ours.layer.transient_backward, scatter.layer.transient_backward);
  add("input X, one layer", ours.input, scatter.input);
  add("weights and gradients, one layer", ours.parameters, scatter.parameters);
  if (ours.other > 0) add("the rest of the model", ours.other, scatter.other);
  add("total, all layers", ours.total(model.layers()), scatter.total(model.layers()));
  if (gpu) {
    const std::int64_t a = model.tokens_that_fit(*gpu, false);
    const std::int64_t b = model.tokens_that_fit(*gpu, true);
    table.add_row(
        {"tokens that fit " + format_bytes(static_cast<double>(*gpu)), std::to_string(a),
         std::to_string(b),
         b == 0 ? "-" : format_fixed(static_cast<double>(a) / static_cast<double>(b), 2)});
  }
  table.print();
  std::printf(
      "\nTotal = layers x (weights, gradients, X, kept) + the largest transient with the "
      "layer's output or gradients.\n%s\n",
      ours.other > 0 ? "The rest of the model is what --other-bytes says."
                     : "Attention, embeddings and the loss are not counted.");
}

int run(const MemoryCommand& command) {
  const Model model(command);
  std::optional<std::size_t> gpu;
  if (!command.gpu.empty()) gpu = gpu_bytes(command.gpu);
  command.json ? print_json(model, gpu) : print_text(model, gpu);
  return kSuccess;
}

}  // namespace

void add_memory(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand(
      "memory", "Bytes kept and transient, beside ScatterMoE, and the tokens that fit a GPU");
  auto options = std::make_shared<MemoryCommand>();
  command
      ->add_option("--shape", options->shape,
                   "Layer: tokens, model width, expert width, experts, top-K")
      ->type_name("T,d,n,E,K")
      ->capture_default_str();
  command->add_option("--layers", options->layers, "MoE layers of the model")
      ->capture_default_str();
  command->add_option("--dtype", options->dtype, "float32 or bfloat16")->capture_default_str();
  command->add_option("--activation", options->activation, "Activation of the experts")
      ->capture_default_str();
  command
      ->add_option("--workspace-limit", options->workspace_limit,
                   "Bound of one call's scratch (slabs of columns), e.g. 512MiB")
      ->type_name("BYTES");
  command
      ->add_option("--parameter-bytes", options->parameter_bytes,
                   "Bytes per parameter for weight, gradient and optimizer state together; "
                   "default: weight and gradient in the dtype")
      ->type_name("N");
  command
      ->add_option("--other-bytes", options->other,
                   "The rest of the model: attention, embeddings, loss, optimizer")
      ->type_name("BYTES");
  command
      ->add_option("--other-bytes-per-token", options->other_per_token,
                   "What of the rest grows with the tokens")
      ->type_name("N");
  command
      ->add_option("--gpu", options->gpu,
                   "Print the tokens that fit: h100-80gb, h200, a100-40gb, a100-80gb or bytes")
      ->type_name("GPU");
  command->add_flag("--json", options->json, "Print JSON");
  command->callback([&action, options] { action = [options] { return run(*options); }; });
}

}  // namespace sonicmoe::cli
