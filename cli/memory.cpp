// sonicmoe memory: what a layer keeps and needs for a moment, beside ScatterMoE, and the tokens
// that fit a GPU; with --model a plan of a whole model (plan_report.cpp).
#include "sonicmoe/memory.hpp"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>

#include "cli/command.hpp"
#include "cli/options.hpp"
#include "cli/output.hpp"
#include "cli/plan_report.hpp"
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
  PlanCommand plan;
};

constexpr std::size_t kPlannedGpu = std::size_t{79} << 30;  // h100

// GiB that the driver reports as total, rounded down.
constexpr std::pair<const char*, std::size_t> kGpus[] = {
    {"a100", 79}, {"a100-40gb", 39}, {"a100-80gb", 79}, {"b200", 178},
    {"h100", 79}, {"h100-80gb", 79}, {"h200", 139},     {"l40s", 44}};

Parser<std::size_t> gpu_bytes() {
  std::vector<std::string> names;
  for (const auto& [name, gib] : kGpus) names.emplace_back(name);
  return {"{" + join(names, ",") + "}|BYTES", join(names, ", ") + " or " + bytes().expected,
          [](std::string_view text) -> std::optional<std::size_t> {
            for (const auto& [name, gib] : kGpus) {
              if (text == name) return gib << 30;
            }
            return bytes().parse(text);
          }};
}

// Bytes that the options make as large as they like: sums and products of 64 bits fit.
using Wide = __int128;

// Everything of one implementation at one number of tokens, in bytes.
struct Footprint {
  MemoryEstimate layer;           // of one layer
  std::size_t input = 0;          // X of one layer, kept for backward by everybody
  Wide parameters = 0;            // of one layer: weights, gradients, optimizer state
  std::size_t peak_forward = 0;   // transients plus O
  std::size_t peak_backward = 0;  // transients plus dO and dX
  Wide other = 0;                 // of the whole model

  Wide kept(std::int64_t layers) const { return Wide{layers} * Wide(layer.kept()); }
  Wide total(std::int64_t layers) const {
    return Wide{layers} * (parameters + Wide(input) + Wide(layer.kept())) +
           Wide(std::max(peak_forward, peak_backward)) + other;
  }
};

class Model {
 public:
  explicit Model(const MemoryCommand& command)
      : command_(command),
        parameter_bytes_(
            command.parameter_bytes.value_or(2.0 * static_cast<double>(size_of(command.dtype)))) {
    const std::int64_t tokens = command.shape.num_tokens;
    require_countable_bytes("--shape", command.shape, command.activation);
    if (is_countable(ours(tokens)) && is_countable(scattermoe(tokens))) return;
    throw usage_error("--shape", "with the other options a model whose bytes stay below 2^63",
                      command.shape.to_string() + " --layers " + std::to_string(command.layers) +
                          " --parameter-bytes " + format_fixed(parameter_bytes_, 1) +
                          " --other-bytes " + std::to_string(command.other) +
                          " --other-bytes-per-token " + format_fixed(command.other_per_token, 1));
  }

  Footprint ours(std::int64_t tokens) const {
    return footprint(tokens, estimate_memory(shape(tokens), command_.workspace_limit));
  }
  Footprint scattermoe(std::int64_t tokens) const {
    return footprint(tokens, estimate_memory_scattermoe(shape(tokens)));
  }

  /// The most tokens whose total is within `bytes`; 0 when the parameters alone do not fit.
  std::int64_t tokens_that_fit(std::size_t bytes, bool scattermoe_formula) const {
    const auto fits = [&](std::int64_t tokens) {
      LayerShape enlarged = command_.shape;
      enlarged.num_tokens = tokens;
      if (!enlarged.has_countable_bytes(command_.activation)) return false;
      const Footprint f = scattermoe_formula ? scattermoe(tokens) : ours(tokens);
      return f.total(command_.layers) <= Wide(bytes);
    };
    std::int64_t low = 0, high = 1;  // low fits, or nothing does
    while (fits(high)) low = std::exchange(high, 2 * high);
    while (high - low > 1) {
      const std::int64_t middle = low + (high - low) / 2;
      (fits(middle) ? low : high) = middle;
    }
    return low;
  }

 private:
  MoEShape shape(std::int64_t tokens) const {
    LayerShape resized = command_.shape;
    resized.num_tokens = tokens;
    return resized.moe_shape(command_.dtype, command_.activation);
  }
  Footprint footprint(std::int64_t tokens, const MemoryEstimate& estimate) const {
    const MoEShape s = shape(tokens);
    const std::size_t element = size_of(command_.dtype);
    const auto x = static_cast<std::size_t>(tokens * s.hidden_size) * element;
    const double parameters =
        static_cast<double>(sonicmoe::parameter_bytes(s)) / static_cast<double>(element);
    return {estimate,
            x,
            static_cast<Wide>(parameters * parameter_bytes_),
            estimate.transient_forward + x,
            estimate.transient_backward + 2 * x,
            Wide(command_.other) +
                static_cast<Wide>(command_.other_per_token * static_cast<double>(tokens))};
  }
  bool is_countable(const Footprint& f) const { return f.total(command_.layers) < Wide{1} << 63; }

  const MemoryCommand& command_;
  double parameter_bytes_;
};

// What fills the memory where not even one token fits.
std::string why_nothing_fits(const MemoryCommand& command, const Footprint& of_one_token) {
  const auto text = [](Wide bytes) { return format_bytes(static_cast<double>(bytes)); };
  const Wide total = of_one_token.total(command.layers);
  const Wide parameters = Wide{command.layers} * of_one_token.parameters;
  const Wide others = total - parameters - of_one_token.other;
  return "no token fits " + text(Wide(*command.gpu)) + ": one needs " + text(total) +
         ", of which weights, gradients and optimizer " + text(parameters) + ", activations " +
         text(others) + ", the rest of the model " + text(of_one_token.other);
}

nlohmann::ordered_json to_json(const Footprint& f, std::int64_t layers) {
  return {{"kept_h_bytes", f.layer.kept_h},
          {"kept_metadata_bytes", f.layer.kept_metadata},
          {"kept_bytes", f.layer.kept()},
          {"kept_bytes_all_layers", static_cast<std::size_t>(f.kept(layers))},
          {"transient_forward_bytes", f.layer.transient_forward},
          {"transient_backward_bytes", f.layer.transient_backward},
          {"input_bytes", f.input},
          {"parameter_bytes", static_cast<std::size_t>(f.parameters)},
          {"other_bytes", static_cast<std::size_t>(f.other)},
          {"total_bytes_all_layers", static_cast<std::size_t>(f.total(layers))}};
}

void print_json(const MemoryCommand& command, const Model& model) {
  const std::int64_t tokens = command.shape.num_tokens;
  nlohmann::ordered_json root;
  root["shape"] = command.shape.to_string();
  root["dtype"] = name_of(command.dtype);
  root["activation"] = name_of(command.activation);
  root["layers"] = command.layers;
  root["sonicmoe"] = to_json(model.ours(tokens), command.layers);
  root["scattermoe"] = to_json(model.scattermoe(tokens), command.layers);
  if (command.gpu) {
    root["gpu_bytes"] = *command.gpu;
    root["sonicmoe"]["tokens_that_fit"] = model.tokens_that_fit(*command.gpu, false);
    root["scattermoe"]["tokens_that_fit"] = model.tokens_that_fit(*command.gpu, true);
    if (root["sonicmoe"]["tokens_that_fit"] == 0) {
      root["why_nothing_fits"] = why_nothing_fits(command, model.ours(1));
    }
  }
  std::printf("%s\n", root.dump(2).c_str());
}

std::string ratio(double ours, double theirs) {
  return ours == 0.0 || theirs == 0.0 ? "-" : format_fixed(theirs / ours, 2);
}

void print_text(const MemoryCommand& command, const Model& model) {
  const LayerShape& shape = command.shape;
  const Footprint ours = model.ours(shape.num_tokens);
  const Footprint scatter = model.scattermoe(shape.num_tokens);
  std::printf("T=%lld d=%lld n=%lld E=%lld K=%lld %s %s, %lld layer%s\n\n",
              static_cast<long long>(shape.num_tokens), static_cast<long long>(shape.hidden_size),
              static_cast<long long>(shape.intermediate_size),
              static_cast<long long>(shape.num_experts), static_cast<long long>(shape.top_k),
              std::string(name_of(command.dtype)).c_str(),
              std::string(name_of(command.activation)).c_str(),
              static_cast<long long>(command.layers), command.layers == 1 ? "" : "s");

  Table table({"", "sonicmoe", "ScatterMoE", "ratio"});
  const auto add = [&](const char* name, auto bytes_of) {
    const auto a = static_cast<double>(bytes_of(ours)), b = static_cast<double>(bytes_of(scatter));
    table.add_row({name, format_bytes(a), format_bytes(b), ratio(a, b)});
  };
  using F = Footprint;
  add("kept, one layer", [](const F& f) { return f.layer.kept(); });
  add("  activations", [](const F& f) { return f.layer.kept_h; });
  add("  routing", [](const F& f) { return f.layer.kept_metadata; });
  add("kept, all layers", [&](const F& f) { return f.kept(command.layers); });
  add("transient, forward", [](const F& f) { return f.layer.transient_forward; });
  add("transient, backward", [](const F& f) { return f.layer.transient_backward; });
  add("input X, one layer", [](const F& f) { return f.input; });
  add("weights and gradients, one layer", [](const F& f) { return f.parameters; });
  if (ours.other > 0) add("the rest of the model", [](const F& f) { return f.other; });
  add("total, all layers", [&](const F& f) { return f.total(command.layers); });
  std::string advice;
  if (command.gpu) {
    const std::int64_t a = model.tokens_that_fit(*command.gpu, false);
    const std::int64_t b = model.tokens_that_fit(*command.gpu, true);
    table.add_row({"tokens that fit " + format_bytes(static_cast<double>(*command.gpu)),
                   std::to_string(a), std::to_string(b),
                   ratio(static_cast<double>(b), static_cast<double>(a))});
    if (a == 0) advice = "\nwarning: " + why_nothing_fits(command, model.ours(1)) + "\n";
  }
  table.print();
  std::fputs(styled(stdout, kYellow, advice).c_str(), stdout);
  std::printf(
      "\nTotal = layers x (weights, gradients, X, kept) + the largest transient with the "
      "layer's output or gradients.\n%s\n",
      ours.other > 0 ? "The rest of the model is what --other-bytes says."
                     : "Attention, embeddings and the loss are not counted.");
}

int run(const MemoryCommand& command, const CLI::App& parsed) {
  check_plan_options(parsed, command.plan.model.has_value());
  if (command.plan.model) {
    PlanCommand plan = command.plan;
    plan.settings.dtype = command.dtype;
    plan.settings.activation = command.activation;
    plan.settings.workspace_limit = command.workspace_limit;
    print_plan(plan, command.gpu.value_or(kPlannedGpu), command.json);
    return kSuccess;
  }
  const Model model(command);
  command.json ? print_json(command, model) : print_text(command, model);
  return kSuccess;
}

}  // namespace

void add_memory(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand(
      "memory",
      "Bytes kept and transient, beside ScatterMoE, and the tokens that fit a GPU; a "
      "plan of a whole model on several GPUs");
  auto options = std::make_shared<MemoryCommand>();
  add_option(*command, "--shape", options->shape, layer_shape(),
             "Layer: tokens, model width, expert width, experts, top-K");
  add_option(*command, "--layers", options->layers, integer<std::int64_t>(1, 100000),
             "MoE layers of the model");
  add_option(*command, "--dtype", options->dtype, float_dtype(), "Of weights and activations");
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
             "Print the tokens that fit this GPU or so many bytes; of a plan: h100");
  add_flag(*command, "--json", options->json, "Print JSON");
  add_plan_options(*command, options->plan);
  add_examples(*command,
               {"sonicmoe memory --shape 32k,2048,1024,64,8 --layers 16 --gpu h100",
                "sonicmoe memory --gpu 80GB --parameter-bytes 14 --other-bytes 12GiB --json",
                "sonicmoe memory --model config.json --gpus 8 --gpu h200 --checkpointing"});
  command->callback([&action, options, command] {
    action = [options, command] { return run(*options, *command); };
  });
}

}  // namespace sonicmoe::cli
