#include "cli/options.hpp"

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "cli/resources.hpp"
#include "rig/host_memory.hpp"
#include "rig/target.hpp"
#include "sonicmoe/backend.hpp"

namespace sonicmoe::cli {
namespace {

constexpr int kMostThreads = 4096;

// A variable that the library reads; empty is the same as unset, as everywhere in the shell.
std::string environment_variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

Device parse_device(const std::string& text) {
  if (text == "cpu") return {DeviceType::kCpu, 0};
  if (text == "cuda") return {DeviceType::kCuda, 0};
  if (text.starts_with("cuda:")) {
    if (const auto index = integer<int>(0, 1023).parse(std::string_view(text).substr(5))) {
      return {DeviceType::kCuda, *index};
    }
  }
  throw usage_error("--device", "cpu, cuda or cuda:INDEX", text);
}

// A device that the machine does not have would fail later, in the middle of the output.
void require_device(const Device& device, const std::string& text) {
  std::vector<std::string> known;
  for (const DeviceInfo& info : devices()) {
    if (info.device.type == device.type && info.device.index == device.index) return;
    known.push_back(to_string(info.device));
  }
  std::string off;
  for (const BackendInfo& info : backends()) {
    if (info.name == "cuda" && !info.available) off = "; cuda is off: " + info.reason;
  }
  throw usage_error("--device", "one of this machine's devices (" + join(known, ", ") + off + ")",
                    text);
}

// `option` is what named the backend.
void require_backend(const std::string& option, const std::string& name) {
  std::vector<std::string> known;
  for (const BackendInfo& info : backends()) {
    if (info.name == name) {
      if (info.available) return;
      throw usage_error(option, "an available backend (" + name + " is off: " + info.reason + ")",
                        name);
    }
    known.push_back(info.name);
  }
  throw usage_error(option, "one of " + join(known, ", "), name);
}

}  // namespace

void add_raw_option(CLI::App& command, const std::string& name, const std::string& type,
                    const std::string& default_value, const std::string& description,
                    std::function<void(const std::vector<std::string>&)> take) {
  const CLI::callback_t callback = [take = std::move(take)](const CLI::results_t& texts) {
    take(texts);
    return true;
  };
  CLI::Option* option = command.add_option(name, callback, description)
                            ->type_name(type)
                            ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  if (!default_value.empty()) option->default_str(default_value);
}

void add_flag(CLI::App& command, const std::string& name, bool& target,
              const std::string& description) {
  command.add_flag(name, target, description)->disable_flag_override();
}

void add_examples(CLI::App& command, const std::vector<std::string>& lines) {
  command.footer("Examples:\n  " + join(lines, "\n  "));
}

void RunOptions::add_to(CLI::App& command) {
  add_option(command, "--backend", backend, text("NAME", "the name of a backend"),
             "Backend to use; default: the first that serves the device");
  add_option(command, "--device", device, text("{cpu,cuda}[:INDEX]", "cpu, cuda or cuda:INDEX"),
             "Where the tensors lie and the operations run");
  add_option(command, "--threads", threads, integer(0, kMostThreads),
             "CPU threads of one call; 0 takes OpenMP's default");
}

std::string RunOptions::words() const {
  std::string words;
  if (!backend.empty()) words += " --backend " + backend;
  if (device != "cpu") words += " --device " + device;
  if (threads != 0) words += " --threads " + std::to_string(threads);
  return words;
}

Context RunOptions::context() {
  if (const std::string log = environment_variable("SONICMOE_LOG"); !log.empty()) {
    parse_value("SONICMOE_LOG", one_of({"dispatch"}), log);
  }
  std::string option = "--backend";
  if (const std::string forced = environment_variable("SONICMOE_BACKEND");
      !forced.empty() && backend.empty()) {
    option = "SONICMOE_BACKEND";
    backend = forced;
  }
  Context context;
  context.device = parse_device(device);
  require_device(context.device, device);
  if (!backend.empty()) require_backend(option, backend);
  context.num_threads = threads;
  context.backend = backend;
  if (!backend.empty() && !rig::serves(context)) {  // it would fail in every operation
    throw usage_error(option, "a backend for " + to_string(context.device), backend);
  }
  const int wanted = threads > 0 ? threads : default_threads();
  if (wanted > kMostThreads) {
    throw usage_error("OMP_NUM_THREADS", "at most " + std::to_string(kMostThreads) + " threads",
                      std::to_string(wanted));
  }
  require_threads(wanted);
  if (const std::size_t memory = rig::usable_host_memory(); memory > 0) {
    rig::limit_host_memory(memory / 10 * 9);
  }
  return context;
}

std::string format_fixed(double value, int digits) {
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, "%.*f", digits, value);
  return buffer;
}

std::string format_bytes(double bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  while (bytes >= 1024.0 && unit < 4) {
    bytes /= 1024.0;
    ++unit;
  }
  const int digits = unit == 0 ? 0 : bytes < 10.0 ? 2 : bytes < 100.0 ? 1 : 0;
  return format_fixed(bytes, digits) + " " + kUnits[unit];
}

}  // namespace sonicmoe::cli
