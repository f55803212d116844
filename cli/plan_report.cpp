#include "cli/plan_report.hpp"

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <vector>

#include "cli/options.hpp"
#include "cli/output.hpp"
#include "cli/table.hpp"

namespace sonicmoe::cli {
namespace {

constexpr std::int64_t kMostGpus = 1 << 20;
constexpr const char* kOfPlans[] = {"--gpus",
                                    "--fsdp",
                                    "--ep",
                                    "--tokens",
                                    "--loss-tokens",
                                    "--parameter-dtype",
                                    "--checkpointing",
                                    "--optimizer-bytes",
                                    "--tflops",
                                    "--nvlink",
                                    "--network"};
constexpr const char* kOfLayers[] = {"--shape", "--layers", "--parameter-bytes", "--other-bytes",
                                     "--other-bytes-per-token"};

// A layout with all that is said about it.
struct Row {
  Layout layout;
  RankMemory memory;
  Traffic traffic;
};

class Plan {
 public:
  Plan(const PlanCommand& command, std::size_t gpu_bytes)
      : gpu_bytes_(static_cast<double>(gpu_bytes)),
        settings_(command.settings),
        model_(read_model_config("--model", *command.model)) {
    const std::int64_t fsdp = command.fsdp.value_or(command.gpus);
    require_divisor("--fsdp", fsdp, "the " + std::to_string(command.gpus) + " GPUs", command.gpus);
    if (command.ep) {
      require_divisor("--ep", *command.ep, "the " + std::to_string(fsdp) + " ranks of --fsdp",
                      fsdp);
      require_divisor("--ep", *command.ep, std::to_string(model_.num_experts) + " experts",
                      model_.num_experts);
    }
    for (const Layout& layout : layouts_of(model_, command.gpus, fsdp)) {
      require_countable(layout);
      rows_.push_back({layout, memory_of_rank(model_, layout, settings_),
                       traffic_of_layer(model_, layout, settings_)});
    }
    const auto wanted = std::find_if(rows_.begin(), rows_.end(), [&](const Row& row) {
      return command.ep ? row.layout.ep == *command.ep : &row == advised();
    });
    shown_ = wanted == rows_.end() ? least_memory() : &*wanted;
  }

  const ModelConfig& model() const { return model_; }
  const PlanSettings& settings() const { return settings_; }
  const std::vector<Row>& rows() const { return rows_; }
  const Row& shown() const { return *shown_; }
  double gpu_bytes() const { return gpu_bytes_; }
  bool fits(const Row& row) const { return row.memory.total() <= gpu_bytes_; }

  /// The smallest ep that fits.
  const Row* smallest() const {
    const auto first =
        std::find_if(rows_.begin(), rows_.end(), [&](const Row& row) { return fits(row); });
    return first == rows_.end() ? nullptr : &*first;
  }

  /// Of the layouts that fit, that with the least traffic in the open; of equals the smallest ep.
  const Row* advised() const {
    const Row* best = smallest();
    for (const Row& row : rows_) {
      if (fits(row) && row.traffic.visible() < best->traffic.visible()) best = &row;
    }
    return best;
  }

  std::string advice() const {
    const Row* row = advised();
    const auto ep = [](const Row* of) { return "--ep " + std::to_string(of->layout.ep); };
    const auto open = [](const Row* of) {
      return format_fixed(of->traffic.visible(), 2) + " of compute";
    };
    if (row == nullptr) {
      return "nothing fits " + format_bytes(gpu_bytes_) + ": the least is " +
             format_bytes(least_memory()->memory.total()) + ", with " + ep(least_memory()) +
             "; fewer --tokens, --loss-tokens, --checkpointing or more --gpus need less";
    }
    const std::string fits = " that fits " + format_bytes(gpu_bytes_);
    if (row == smallest()) {
      return ep(row) + ", the smallest" + fits +
             ", has the least traffic in the open: " + open(row);
    }
    return ep(row) + " has the least traffic in the open, " + open(row) + "; " + ep(smallest()) +
           ", the smallest" + fits + ", has " + open(smallest());
  }

 private:
  static void require_divisor(const char* option, std::int64_t value, const std::string& of,
                              std::int64_t count) {
    if (count % value != 0) {
      throw usage_error(option, "a number that divides " + of, std::to_string(value));
    }
  }
  void require_countable(const Layout& layout) const {
    const LayerShape shape{settings_.tokens * layout.ep, model_.hidden_size, model_.expert_width,
                           model_.num_experts, model_.top_k};
    const double total = count_parameters(model_, settings_.activation).total;
    if (shape.has_countable_bytes(settings_.activation) && total < 0x1p57) return;
    throw usage_error("--model", "with --tokens layers whose bytes stay below 2^62",
                      shape.to_string());
  }
  const Row* least_memory() const {
    return &*std::min_element(rows_.begin(), rows_.end(), [](const Row& a, const Row& b) {
      return a.memory.total() < b.memory.total();
    });
  }
  double gpu_bytes_;
  PlanSettings settings_;
  ModelConfig model_;
  std::vector<Row> rows_;
  const Row* shown_ = nullptr;
};

std::uint64_t whole(double bytes) { return static_cast<std::uint64_t>(bytes); }

nlohmann::ordered_json to_json(const Plan& plan, const Row& row) {
  const RankMemory& m = row.memory;
  const Traffic& t = row.traffic;
  return {{"gpus", row.layout.gpus},
          {"fsdp", row.layout.fsdp},
          {"ep", row.layout.ep},
          {"expert_shards", row.layout.expert_shards()},
          {"parameter_bytes", whole(m.parameters)},
          {"gradient_bytes", whole(m.gradients)},
          {"optimizer_bytes", whole(m.optimizer)},
          {"kept_bytes", whole(m.kept)},
          {"root_bytes", whole(m.root)},
          {"gathered_bytes", whole(m.gathered)},
          {"transient_bytes", whole(m.scratch)},
          {"exchange_bytes", whole(m.exchange)},
          {"loss_bytes", whole(m.loss)},
          {"total_bytes", whole(m.total())},
          {"fits", plan.fits(row)},
          {"weight_traffic_bytes", whole(t.weight_bytes)},
          {"token_traffic_bytes", whole(t.token_bytes)},
          {"weights_over_compute", t.weights_over_compute()},
          {"tokens_over_compute", t.tokens_over_compute()}};
}

void print_json(const Plan& plan) {
  const ParameterCount count = count_parameters(plan.model(), plan.settings().activation);
  nlohmann::ordered_json root;
  root["model"] = plan.model().type;
  root["parameters"] = whole(count.total);
  root["active_parameters"] = whole(count.active);
  root["tokens"] = plan.settings().tokens;
  root["gpu_bytes"] = whole(plan.gpu_bytes());
  root["layout"] = to_json(plan, plan.shown());
  root["layouts"] = nlohmann::ordered_json::array();
  for (const Row& row : plan.rows()) root["layouts"].push_back(to_json(plan, row));
  root["advice"] = plan.advice();
  std::printf("%s\n", root.dump(2).c_str());
}

void print_rank(const Row& row) {
  const RankMemory& m = row.memory;
  Table table({"a rank", ""});
  const auto add = [&](const char* name, double bytes) {
    table.add_row({name, format_bytes(bytes)});
  };
  add("parameters", m.parameters);
  add("gradients", m.gradients);
  add("optimizer states", m.optimizer);
  add("kept by all layers", m.kept);
  add("gathered embedding and head", m.root);
  add("a layer: gathered weights, gradients", m.gathered);
  add("a layer: scratch", m.scratch);
  add("a layer: exchange", m.exchange);
  add("loss", m.loss);
  add("total", m.total());
  table.print();
}

void print_layouts(const Plan& plan) {
  Table table({"ep", "experts' shards", "total", "fits", "weights / compute", "tokens / compute"},
              0);
  for (const Row& row : plan.rows()) {
    table.add_row({std::to_string(row.layout.ep), std::to_string(row.layout.expert_shards()),
                   format_bytes(row.memory.total()), plan.fits(row) ? "yes" : "no",
                   format_fixed(row.traffic.weights_over_compute(), 2),
                   format_fixed(row.traffic.tokens_over_compute(), 2)});
  }
  table.print();
}

void print_text(const Plan& plan) {
  const ParameterCount count = count_parameters(plan.model(), plan.settings().activation);
  const Layout& layout = plan.shown().layout;
  const std::string type = plan.model().type.empty() ? "model" : plan.model().type;
  std::printf(
      "%s, %s B parameters, %s B active; %lld tokens a rank and microbatch\n"
      "%lld GPU%s: FSDP over %lld, experts over %lld ranks x %lld shards\n\n",
      type.c_str(), format_fixed(count.total / 1e9, 2).c_str(),
      format_fixed(count.active / 1e9, 2).c_str(), static_cast<long long>(plan.settings().tokens),
      static_cast<long long>(layout.gpus), layout.gpus == 1 ? "" : "s",
      static_cast<long long>(layout.fsdp), static_cast<long long>(layout.ep),
      static_cast<long long>(layout.expert_shards()));
  print_rank(plan.shown());
  std::printf(
      "\nTotal = states, kept and embedding + the larger of a layer's lines and the loss.\n"
      "Of a layer with experts and a microbatch, bytes that travel over compute:\n\n");
  print_layouts(plan);
  const std::string advice = "\nadvice: " + plan.advice() + "\n";
  std::fputs(plan.advised() ? advice.c_str() : styled(stdout, kYellow, advice).c_str(), stdout);
}

std::string given(const CLI::Option& option) {
  return option.results().empty() ? "" : option.results().front();
}

}  // namespace

void add_plan_options(CLI::App& command, PlanCommand& plan) {
  PlanSettings& settings = plan.settings;
  add_option(command, "--model", plan.model, text("FILE", "the name of a config.json"),
             "Plan a whole model of transformers by its config.json; the options below are of a "
             "plan");
  add_option(command, "--gpus", plan.gpus, integer<std::int64_t>(1, kMostGpus), "GPUs of the run");
  add_option(command, "--fsdp", plan.fsdp, integer<std::int64_t>(1, kMostGpus),
             "GPUs that share one copy of the model; default: all");
  add_option(command, "--ep", plan.ep, integer<std::int64_t>(1, kMostGpus),
             "Of these, GPUs that share the experts of a layer; default: the advised number");
  add_option(command, "--tokens", settings.tokens, count(1, std::int64_t{1} << 31),
             "Tokens of a rank and microbatch");
  add_option(command, "--loss-tokens", settings.loss_tokens, count(0, std::int64_t{1} << 31),
             "Tokens whose logits exist at a time; 0: all");
  add_flag(command, "--checkpointing", settings.checkpointing,
           "Layers keep their input alone and are computed again");
  add_option(command, "--parameter-dtype", settings.parameter_dtype, float_dtype(),
             "Of the shards of parameters and gradients");
  add_option(command, "--optimizer-bytes", settings.optimizer_bytes, number(0, 1024),
             "Bytes of optimizer state per parameter");
  add_option(command, "--tflops", settings.tflops, number(1, 1e6),
             "TFLOP/s that a GPU reaches in products");
  add_option(command, "--nvlink", settings.nvlink, number(1, 1e6),
             "GB/s that a collective reaches for each GPU within a host of 8");
  add_option(command, "--network", settings.network, number(0.1, 1e6), "The same between hosts");
}

void check_plan_options(const CLI::App& command, bool has_model) {
  for (const char* name : kOfPlans) {
    const CLI::Option* option = command.get_option(name);
    if (!has_model && option->count() > 0) {
      throw usage_error(name, "--model FILE beside it", given(*option));
    }
  }
  for (const char* name : kOfLayers) {
    const CLI::Option* option = command.get_option(name);
    if (has_model && option->count() > 0) {
      throw usage_error(name, "no --model beside it", given(*option));
    }
  }
}

void print_plan(const PlanCommand& command, std::size_t gpu_bytes, bool json) {
  const Plan plan(command, gpu_bytes);
  json ? print_json(plan) : print_text(plan);
}

}  // namespace sonicmoe::cli
