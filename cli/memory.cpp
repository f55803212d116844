// sonicmoe memory: what a layer keeps and needs for a moment, beside ScatterMoE, and the tokens
// that fit a GPU.
#include "sonicmoe/memory.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <initializer_list>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "cli/command.hpp"
#include "cli/options.hpp"
#include "cli/table.hpp"

namespace sonicmoe::cli {
namespace {

struct MemoryCommand {
  LayerShape shape{32768, 2048, 1024, 64, 8};
  DType dtype = DType::kBFloat16;
  Activation activation = Activation::kSwiGLU;
  std::optional<std::size_t> workspace_limit;
  std::optional<std::size_t> gpu;
  std::int64_t layers = 1;
  std::optional<double> parameter_bytes;  // per parameter; else weight and gradient in the dtype
  std::size_t other = 0;         // bytes of the rest of the model that do not grow with the tokens
  double other_per_token = 0.0;  // bytes
  bool json = false;
};

struct Gpu {
  const char* name;
  double gib;  // what the driver reports as total, rounded down
};
constexpr std::array<Gpu, 4> kGpus{
    {{"a100-40gb", 39.0}, {"a100-80gb", 79.0}, {"h100-80gb", 79.0}, {"h200", 139.0}}};

Parser<std::size_t> gpu_bytes() {
  std::string known;
  for (const Gpu& gpu : kGpus) known += std::string(gpu.name) + ", ";
  return {"GPU", known + "or " + bytes().expected,
          [](std::string_view text) -> std::optional<std::size_t> {
            for (const Gpu& gpu : kGpus) {
              if (text == gpu.name) return static_cast<std::size_t>(gpu.gib * 1024 * 1024 * 1024);
            }
            return bytes().parse(text);
          }};
}

// Sums and products of bytes that the options make as large as they like.
// Errors: std::overflow_error from 2^63 on.
std::size_t sum(std::initializer_list<std::size_t> terms) {
  std::int64_t total = 0;
  for (const std::size_t term : terms) {
    if (__builtin_add_overflow(total, term, &total)) throw std::overflow_error("bytes");
  }
  return static_cast<std::size_t>(total);
}
std::size_t product(std::size_t a, std::size_t b) {
  std::int64_t result = 0;
  if (__builtin_mul_overflow(a, b, &result)) throw std::overflow_error("bytes");
  return static_cast<std::size_t>(result);
}
std::size_t whole_bytes(double bytes) {
  if (!(bytes < 0x1p63)) throw std::overflow_error("bytes");
  return static_cast<std::size_t>(bytes);
}

// Everything of one implementation at one number of tokens, in bytes.
struct Footprint {
  MemoryEstimate layer;           // of one layer
  std::size_t input = 0;          // X of one layer, kept for backward by everybody
  std::size_t parameters = 0;     // of one layer: weights, gradients, optimizer state
  std::size_t peak_forward = 0;   // transients plus O
  std::size_t peak_backward = 0;  // transients plus dO and dX
  std::size_t other = 0;          // of the whole model

  std::size_t kept(std::int64_t layers) const {
    return product(static_cast<std::size_t>(layers), layer.kept());
  }
  std::size_t total(std::int64_t layers) const {
    return sum({product(static_cast<std::size_t>(layers), sum({parameters, input, layer.kept()})),
                std::max(peak_forward, peak_backward), other});
  }
};

class Model {
 public:
  explicit Model(const MemoryCommand& command)
      : shape_(command.shape),
        layers_(command.layers),
        dtype_(command.dtype),
        activation_(command.activation),
        limit_(command.workspace_limit),
        parameter_bytes_(
            command.parameter_bytes.value_or(2.0 * static_cast<double>(size_of(command.dtype)))),
        other_(command.other),
        other_per_token_(command.other_per_token) {
    require_countable_bytes("--shape", shape_, activation_);
    try {
      for (const Footprint& f : {ours(shape_.num_tokens), scattermoe(shape_.num_tokens)}) {
        f.total(layers_);
      }
    } catch (const std::overflow_error&) {
      throw usage_error("--shape", "with the other options a model whose bytes stay below 2^63",
                        shape_.to_string() + " --layers " + std::to_string(layers_) +
                            " --parameter-bytes " + format_fixed(parameter_bytes_, 1) +
                            " --other-bytes " + std::to_string(other_) +
                            " --other-bytes-per-token " + format_fixed(other_per_token_, 1));
    }
  }

  MoEShape shape(std::int64_t tokens) const {
    LayerShape resized = shape_;
    resized.num_tokens = tokens;
    return resized.moe_shape(dtype_, activation_);
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
      LayerShape enlarged = shape_;
      enlarged.num_tokens = tokens;
      if (!enlarged.has_countable_bytes(activation_)) return false;
      try {
        const Footprint f = scattermoe_formula ? scattermoe(tokens) : ours(tokens);
        return f.total(layers_) <= bytes;
      } catch (const std::overflow_error&) {
        return false;
      }
    };
    std::int64_t low = 0, high = 1;  // low fits, or nothing does
    while (fits(high)) low = std::exchange(high, 2 * high);
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
            whole_bytes(parameters * parameter_bytes_),
            estimate.transient_forward + x,
            estimate.transient_backward + 2 * x,
            sum({other_, whole_bytes(other_per_token_ * static_cast<double>(tokens))})};
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
          {"kept_bytes_all_layers", f.kept(layers)},
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
  add("kept, all layers", ours.kept(model.layers()), scatter.kept(model.layers()));
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
  command.json ? print_json(model, command.gpu) : print_text(model, command.gpu);
  return kSuccess;
}

}  // namespace

void add_memory(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand(
      "memory", "Bytes kept and transient, beside ScatterMoE, and the tokens that fit a GPU");
  auto options = std::make_shared<MemoryCommand>();
  add_option(*command, "--shape", options->shape, layer_shape(),
             "Layer: tokens, model width, expert width, experts, top-K");
  add_option(*command, "--layers", options->layers, integer<std::int64_t>(1, 100000),
             "MoE layers of the model");
  add_option(*command, "--dtype", options->dtype, float_dtype(), "float32 or bfloat16");
  add_option(*command, "--activation", options->activation, enumerator(all_activations()),
             "Activation of the experts");
  add_option(*command, "--workspace-limit", options->workspace_limit, bytes(),
             "Bound of one call's scratch (slabs of columns), e.g. 512MiB");
  add_option(*command, "--parameter-bytes", options->parameter_bytes, number(0, 1024),
             "Bytes per parameter for weight, gradient and optimizer state together; "
             "default: weight and gradient in the dtype");
  add_option(*command, "--other-bytes", options->other, bytes(),
             "The rest of the model: attention, embeddings, loss, optimizer");
  add_option(*command, "--other-bytes-per-token", options->other_per_token, number(0, 1e9),
             "What of the rest grows with the tokens");
  add_option(*command, "--gpu", options->gpu, gpu_bytes(),
             "Print the tokens that fit: h100-80gb, h200, a100-40gb, a100-80gb or bytes");
  add_flag(*command, "--json", options->json, "Print JSON");
  command->callback([&action, options] { action = [options] { return run(*options); }; });
}

}  // namespace sonicmoe::cli
