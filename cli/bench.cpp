// sonicmoe bench: time forward and backward of the layer. Checks first, then times.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cli/command.hpp"
#include "cli/options.hpp"
#include "cli/output.hpp"
#include "cli/problems.hpp"
#include "cli/resources.hpp"
#include "cli/table.hpp"
#include "rig/host_memory.hpp"
#include "rig/large_layer.hpp"
#include "rig/random.hpp"
#include "sonicmoe/memory.hpp"
#include "sonicmoe/version.hpp"

#if defined(__unix__)
#include <unistd.h>
#endif

namespace sonicmoe::cli {
namespace {

struct BenchCommand {
  RunOptions run;
  std::optional<LayerShape> shape;
  std::optional<std::string> suite;
  std::optional<std::vector<DType>> dtypes;
  Activation activation = Activation::kSwiGLU;
  std::optional<std::size_t> workspace_limit;
  std::optional<std::int64_t> tokens;  // else those of the shape
  std::uint64_t seed = 0;
  int repeats = 20;
  int warmup = 2;
  double seconds = 10.0;  // per direction and row
  bool with_router = false;
  bool without_check = false;
  bool json = false;
};

bool on_host(Device device) { return device.type == DeviceType::kCpu; }

struct Statistics {
  double median = 0.0, p10 = 0.0, p90 = 0.0;  // seconds
  std::size_t samples = 0;
  std::size_t calls_per_sample = 1;
};

Statistics statistics_of(std::vector<double> seconds, std::size_t calls_per_sample) {
  std::sort(seconds.begin(), seconds.end());
  const auto at = [&](double quantile) {  // linear between neighbours
    const double place = quantile * static_cast<double>(seconds.size() - 1);
    const auto low = static_cast<std::size_t>(place);
    const std::size_t high = std::min(low + 1, seconds.size() - 1);
    const double share = place - static_cast<double>(low);
    return seconds[low] + (seconds[high] - seconds[low]) * share;  // equal ones exactly
  };
  return {at(0.5), at(0.1), at(0.9), seconds.size(), calls_per_sample};
}

// Until the device has finished the work.
double time_once(Device device, const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  rig::memory_of(device).synchronize();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Calls to time back to back on a GPU, so many that starting the first and waiting for the last
// (about 20 us) do not show.
std::size_t calls_per_sample(double seconds_of_one) {
  return static_cast<std::size_t>(std::clamp(std::ceil(0.01 / seconds_of_one), 1.0, 50.0));
}

// One shape and dtype to time.
struct Row {
  std::string name;
  LayerShape shape;
  DType dtype = DType::kFloat32;
};

struct Result {
  Row row;
  std::string skipped;  // the reason, where the row was not run
  std::string wrong;    // what the check found; nothing was timed then
  Statistics forward, backward;
  double forward_rate = 0.0, backward_rate = 0.0;  // model GFLOP/s
  std::size_t kept = 0, peak_forward = 0, peak_backward = 0;
  std::size_t buffers = 0;  // sets of buffers rotated
};

// The CUDA backend takes bfloat16 only, and the problems of `cpu` are too small for a GPU.
std::vector<Row> rows_of(const BenchCommand& command, Device device) {
  if (command.shape && command.suite) {
    throw usage_error("--suite", "either --shape or --suite", *command.suite);
  }
  Suite suite;
  if (command.shape) {
    suite = {"shape", {DType::kFloat32}, {{"shape", *command.shape}}};
  } else {
    suite = find_suite(command.suite.value_or(on_host(device) ? "cpu" : "paper"));
  }
  if (!on_host(device)) suite.dtypes = {DType::kBFloat16};
  if (command.dtypes) suite.dtypes = *command.dtypes;
  std::vector<Row> rows;
  for (const Problem& problem : suite.problems) {
    for (const DType dtype : suite.dtypes) {
      Row row{problem.name, problem.shape, dtype};
      if (command.tokens) row.shape.num_tokens = *command.tokens;
      require_countable_bytes(command.tokens ? "--tokens" : "--shape", row.shape,
                              command.activation);
      rows.push_back(row);
    }
  }
  return rows;
}

// Median and quantiles of at least three and at most `repeats` samples within the time budget.
// Each call takes the next set of buffers.
Statistics measure(const BenchCommand& command, Device device,
                   std::vector<std::unique_ptr<rig::LargeLayer>>& layers,
                   void (rig::LargeLayer::*call)(), Progress& progress, const std::string& label) {
  std::size_t next = 0;
  const auto call_next = [&] { (*layers[next++ % layers.size()].*call)(); };
  for (int i = 0; i < command.warmup; ++i) call_next();
  rig::memory_of(device).synchronize();
  const std::size_t calls = on_host(device) ? 1 : calls_per_sample(time_once(device, call_next));
  std::vector<double> seconds;
  double total = 0.0;
  while (seconds.size() < static_cast<std::size_t>(command.repeats) &&
         (seconds.size() < 3 || total < command.seconds)) {
    progress.show(label + " " + std::to_string(seconds.size() + 1) + "/" +
                  std::to_string(command.repeats));
    const double elapsed = time_once(device, [&] {
      for (std::size_t i = 0; i < calls; ++i) call_next();
    });
    seconds.push_back(elapsed / static_cast<double>(calls));
    total += elapsed;
  }
  return statistics_of(std::move(seconds), calls);
}

// How many layers to take turns with, so that none finds its data in the last-level cache.
std::size_t sets_to_rotate(Device device, std::size_t bytes_of_one) {
  constexpr std::size_t kMostSets = 8;
  std::size_t cache = std::size_t{64} << 20;  // more than the L2 of a Hopper GPU
#if defined(_SC_LEVEL3_CACHE_SIZE)
  if (const long size = sysconf(_SC_LEVEL3_CACHE_SIZE); on_host(device) && size > 0) {
    cache = static_cast<std::size_t>(size);
  }
#endif
  return std::clamp<std::size_t>(cache / std::max<std::size_t>(bytes_of_one, 1) + 1, 1, kMostSets);
}

// Why a row of so many bytes on the device, and of `extra` on the host, is not even tried, or
// empty.
std::string reason_against(Device device, double needed, double extra) {
  if (!on_host(device)) {
    const std::string reason = reason_against(Device{}, extra, 0.0);
    if (!reason.empty()) return reason;
    extra = 0.0;
  }
  const auto memory = static_cast<double>(rig::usable_memory(device));
  if (memory == 0.0 || needed + extra <= 0.9 * memory) return {};
  return "needs " + format_bytes(needed + extra) + ", " +
         (on_host(device) ? "this process may use " : "this GPU has ") + format_bytes(memory) +
         " (--tokens makes it smaller)";
}

Result run_row(const BenchCommand& command, const Context& context, const Row& row,
               Progress& progress, const std::string& place) {
  Result result;
  result.row = row;
  constexpr std::int64_t kMostPairs = (std::int64_t{1} << 31) - 2;  // of one operation
  if (row.shape.num_tokens > kMostPairs / row.shape.top_k) {
    result.skipped =
        "has more than 2^31 - 2 pairs of tokens and experts (--tokens makes it smaller)";
    return result;
  }
  const MoEShape shape = row.shape.moe_shape(row.dtype, command.activation);
  const std::size_t needed =
      rig::LargeLayer::total_bytes(context, shape, command.with_router, command.workspace_limit);
  result.skipped =
      reason_against(context.device, static_cast<double>(needed),
                     rig::LargeLayer::reference_bytes(context, shape, !command.without_check));
  if (!result.skipped.empty()) return result;
  const std::string label = place + " " + row.name + " " + std::string(name_of(row.dtype)) + ": ";
  progress.show(label + "making data");
  std::vector<std::unique_ptr<rig::LargeLayer>> layers;
  const std::size_t sets = sets_to_rotate(context.device, needed);
  rig::MoECase sizes;
  sizes.num_tokens = row.shape.num_tokens;
  sizes.hidden_size = row.shape.hidden_size;
  sizes.intermediate_size = row.shape.intermediate_size;
  sizes.num_experts = row.shape.num_experts;
  sizes.top_k = row.shape.top_k;
  sizes.activation = command.activation;
  sizes.dtype = row.dtype;
  for (std::size_t i = 0; i < sets; ++i) {
    sizes.seed = rig::Random{command.seed, i}.bits() >> 2;
    layers.push_back(std::make_unique<rig::LargeLayer>(context, sizes, command.with_router,
                                                       command.workspace_limit));
  }
  require_headroom();
  if (!command.without_check) {
    progress.show(label + "checking");
    layers.front()->forward();
    layers.front()->backward();
    const std::vector<std::string> problems = layers.front()->check();
    if (!problems.empty()) {
      result.wrong = problems.front();
      return result;
    }
  }
  result.buffers = sets;
  result.forward = measure(command, context.device, layers, &rig::LargeLayer::forward, progress,
                           label + "forward");
  for (auto& layer : layers) layer->forward();
  result.backward = measure(command, context.device, layers, &rig::LargeLayer::backward, progress,
                            label + "backward");
  const rig::LargeLayer& layer = *layers.front();
  result.forward_rate = forward_flops(layer.shape()) / result.forward.median / 1e9;
  result.backward_rate = backward_flops(layer.shape()) / result.backward.median / 1e9;
  result.kept = layer.kept_bytes();
  result.peak_forward = layer.peak_forward_bytes();
  result.peak_backward = layer.peak_backward_bytes();
  return result;
}

nlohmann::ordered_json to_json(const Statistics& s, double rate) {
  return {{"median_ms", s.median * 1e3},
          {"p10_ms", s.p10 * 1e3},
          {"p90_ms", s.p90 * 1e3},
          {"samples", s.samples},
          {"calls_per_sample", s.calls_per_sample},
          {"model_gflops_per_s", rate}};
}

std::string repeat_line(const BenchCommand& command, const Row& row) {
  std::string line = "sonicmoe bench --shape " + row.shape.to_string() + " --dtype " +
                     std::string(name_of(row.dtype)) + " --activation " +
                     std::string(name_of(command.activation));
  if (command.with_router) line += " --layer";
  if (command.workspace_limit) {
    line += " --workspace-limit " + std::to_string(*command.workspace_limit);
  }
  return line + command.run.words();
}

// Why the figures may not be those of a quiet machine. `load` is the load average before the first
// row, negative where nothing is known.
std::vector<std::string> warnings(double load, const std::vector<Result>& results) {
  constexpr double kBusy = 0.25;       // of the CPUs
  constexpr double kWideSpread = 0.2;  // between the 10th and the 90th percentile
  std::vector<std::string> found;
  const unsigned cpus = std::max(1u, std::thread::hardware_concurrency());
  if (load > kBusy * cpus) {
    found.push_back("other work ran beside this: load average " + format_fixed(load, 1) + " on " +
                    std::to_string(cpus) + " CPUs");
  }
  for (const Result& r : results) {
    for (const auto& [direction, s] : {std::pair{"forward", r.forward}, {"backward", r.backward}}) {
      if (!r.skipped.empty() || s.p90 - s.p10 <= kWideSpread * s.median) continue;
      found.push_back(r.row.name + " " + std::string(name_of(r.row.dtype)) + " " + direction +
                      ": the times spread by " +
                      format_fixed(100.0 * (s.p90 - s.p10) / s.median, 0) + "% (p10..p90)");
    }
  }
  return found;
}

void print_json(const BenchCommand& command, const std::vector<std::string>& warnings,
                const std::vector<Result>& results) {
  nlohmann::ordered_json root;
  root["version"] = version();
  root["backend"] = command.run.backend;
  root["device"] = command.run.device;
  root["threads"] = command.run.threads;
  root["with_router"] = command.with_router;
  root["warnings"] = warnings;
  root["rows"] = nlohmann::ordered_json::array();
  for (const Result& r : results) {
    nlohmann::ordered_json row;
    row["name"] = r.row.name;
    row["shape"] = r.row.shape.to_string();
    row["dtype"] = name_of(r.row.dtype);
    if (!r.skipped.empty()) {
      row["skipped"] = r.skipped;
    } else {
      row["forward"] = to_json(r.forward, r.forward_rate);
      row["backward"] = to_json(r.backward, r.backward_rate);
      row["kept_bytes"] = r.kept;
      row["peak_forward_bytes"] = r.peak_forward;
      row["peak_backward_bytes"] = r.peak_backward;
      row["buffer_sets"] = r.buffers;
    }
    row["command"] = repeat_line(command, r.row);
    root["rows"].push_back(row);
  }
  std::printf("%s\n", root.dump(2).c_str());
}

std::string milliseconds(const Statistics& s) {
  return format_fixed(s.median * 1e3, 2) + " (" + format_fixed(s.p10 * 1e3, 2) + ".." +
         format_fixed(s.p90 * 1e3, 2) + ")";
}

void print_text(const BenchCommand& command, const std::vector<std::string>& warnings,
                const std::vector<Result>& results) {
  Table table({"problem", "T,d,n,E,K", "dtype", "forward ms (p10..p90)", "GFLOP/s",
               "backward ms (p10..p90)", "GFLOP/s", "kept", "peak fwd", "peak bwd"},
              3);
  for (const Result& r : results) {
    if (!r.skipped.empty()) continue;
    table.add_row({r.row.name, r.row.shape.to_string(), std::string(name_of(r.row.dtype)),
                   milliseconds(r.forward), format_fixed(r.forward_rate, 1),
                   milliseconds(r.backward), format_fixed(r.backward_rate, 1),
                   format_bytes(static_cast<double>(r.kept)),
                   format_bytes(static_cast<double>(r.peak_forward)),
                   format_bytes(static_cast<double>(r.peak_backward))});
  }
  table.print();
  for (const Result& r : results) {
    if (!r.skipped.empty()) {
      std::printf("skipped %s %s: %s\n", r.row.name.c_str(),
                  std::string(name_of(r.row.dtype)).c_str(), r.skipped.c_str());
    }
  }
  for (const std::string& warning : warnings) {
    std::printf("%s\n", styled(stdout, kYellow, "warning: " + warning).c_str());
  }
  std::printf(
      "\n%s; model FLOPs (padding never counts); kept: H and routing; peak: kept, the "
      "call's workspace and its output or dX.\nRepeat a row: %s\n",
      command.with_router ? "Whole layer with its router" : "Experts with ready routing",
      repeat_line(command, results.front().row).c_str());
}

// The row, or the row with the reason why it was skipped.
Result try_row(const BenchCommand& command, const Context& context, const Row& row,
               Progress& progress, const std::string& place) {
  try {
    return run_row(command, context, row, progress, place);
  } catch (const std::bad_alloc&) {
  } catch (const OutOfMemory&) {
  }
  Result result;
  result.row = row;
  result.skipped = "not enough memory (--tokens makes it smaller)";
  return result;
}

int run(BenchCommand command) {
  const Context context = command.run.context();
  const std::vector<Row> rows = rows_of(command, context.device);

  double load = -1.0;
#if defined(__unix__)
  getloadavg(&load, 1);
#endif
  Progress progress(true);
  std::vector<Result> results;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const std::string place = "[" + std::to_string(i + 1) + "/" + std::to_string(rows.size()) + "]";
    results.push_back(try_row(command, context, rows[i], progress, place));
    if (results.back().wrong.empty()) continue;
    progress.clear();
    report(rows[i].name + " " + std::string(name_of(rows[i].dtype)) +
           " computes wrong results, nothing was timed: " + results.back().wrong);
    return kFailure;
  }
  progress.clear();
  const std::vector<std::string> doubts = warnings(load, results);
  command.json ? print_json(command, doubts, results) : print_text(command, doubts, results);
  const auto skipped = [](const Result& result) { return !result.skipped.empty(); };
  if (!std::all_of(results.begin(), results.end(), skipped)) return kSuccess;
  report("nothing was timed: " + results.front().row.name + ": " + results.front().skipped);
  return kFailure;
}

}  // namespace

void add_bench(CLI::App& app, Action& action) {
  CLI::App* command =
      app.add_subcommand("bench", "Time forward and backward of one layer or of a suite");
  auto options = std::make_shared<BenchCommand>();
  constexpr int kMostCalls = 1'000'000;
  add_option(*command, "--shape", options->shape, layer_shape(),
             "One layer: tokens, model width, expert width, experts, top-K");
  add_option(*command, "--suite", options->suite, one_of(suite_names()),
             "A list of layers; default: cpu, on CUDA paper");
  add_option(*command, "--dtype", options->dtypes, float_dtypes(),
             "Default: the suite's, float32 for --shape; on CUDA bfloat16");
  add_option(*command, "--tokens", options->tokens, count(1, std::int64_t{1} << 31),
             "Use this many tokens in place of the suite's T");
  add_option(*command, "--activation", options->activation, enumerator(all_activations()),
             "Activation of the experts");
  add_flag(*command, "--layer", options->with_router, "Time the whole layer with its router");
  add_option(*command, "--workspace-limit", options->workspace_limit, bytes(),
             "Bound of one call's scratch");
  add_option(*command, "--repeats", options->repeats, integer(1, kMostCalls),
             "Most samples to time: a call each, on CUDA about 10 ms of calls");
  add_option(*command, "--seconds", options->seconds, number(0, 1e6),
             "Stop after this time (but not before 3 calls)");
  add_option(*command, "--warmup", options->warmup, integer(0, kMostCalls), "Calls before timing");
  add_option(*command, "--seed", options->seed, integer<std::uint64_t>(0), "Seed of the data");
  add_flag(*command, "--no-check", options->without_check,
           "Do not check the results before timing");
  options->run.add_to(*command);
  add_flag(*command, "--json", options->json, "Print JSON");
  add_examples(*command,
               {"sonicmoe bench", "sonicmoe bench --shape 2k,256,128,16,4 --dtype both --layer",
                "sonicmoe bench --suite models --tokens 8k --device cuda"});
  command->callback([&action, options] { action = [options] { return run(*options); }; });
}

}  // namespace sonicmoe::cli
