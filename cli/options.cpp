#include "cli/options.hpp"

#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <optional>

#include "sonicmoe/backend.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe::cli {
namespace {

std::optional<std::int64_t> parse_integer(std::string_view text) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return {};
  return value;
}

Device parse_device(const std::string& text) {
  if (text == "cpu") return {DeviceType::kCpu, 0};
  if (text == "cuda") return {DeviceType::kCuda, 0};
  if (text.starts_with("cuda:")) {
    const auto index = parse_integer(std::string_view(text).substr(5));
    if (index && *index >= 0 && *index < 1024) {
      return {DeviceType::kCuda, static_cast<int>(*index)};
    }
  }
  throw usage_error("--device", "cpu, cuda or cuda:INDEX", text);
}

std::string name_of(const Device& device) {
  return device.type == DeviceType::kCpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

// A device that the machine does not have would fail later, in the middle of the output.
void require_device(const Device& device, const std::string& text) {
  std::string known;
  for (const DeviceInfo& info : devices()) {
    if (info.device.type == device.type && info.device.index == device.index) return;
    known += (known.empty() ? "" : ", ") + name_of(info.device);
  }
  for (const BackendInfo& info : backends()) {
    if (info.name == "cuda" && !info.available) known += "; cuda is off: " + info.reason;
  }
  throw usage_error("--device", "one of this machine's devices (" + known + ")", text);
}

void require_backend(const std::string& name) {
  std::string known;
  for (const BackendInfo& info : backends()) {
    if (info.name == name) {
      if (info.available) return;
      throw usage_error("--backend",
                        "an available backend (" + name + " is off: " + info.reason + ")", name);
    }
    known += (known.empty() ? "" : ", ") + info.name;
  }
  throw usage_error("--backend", "one of " + known, name);
}

// A backend that does not serve the device would fail in every operation.
void require_backend_of_device(const Context& context) {
  try {
    round_tokens_workspace_bytes(context, 1, 1, 1);  // any operation: it chooses a backend
  } catch (const Error&) {
    throw usage_error("--backend", "a backend for " + name_of(context.device),
                      std::string(context.backend));
  }
}

}  // namespace

void RunOptions::add_to(CLI::App& command) {
  command
      .add_option("--backend", backend, "Backend to use; default: the first that serves the device")
      ->type_name("NAME");
  command.add_option("--device", device, "cpu, cuda or cuda:INDEX")
      ->type_name("DEVICE")
      ->capture_default_str();
  command.add_option("--threads", threads, "CPU threads of one call; 0 takes OpenMP's default")
      ->type_name("N")
      ->capture_default_str();
}

Context RunOptions::context() const {
  if (threads < 0 || threads > 4096) {
    throw usage_error("--threads", "0 to 4096", std::to_string(threads));
  }
  Context context;
  context.device = parse_device(device);
  require_device(context.device, device);
  if (!backend.empty()) require_backend(backend);
  context.num_threads = threads;
  context.backend = backend;
  if (!backend.empty()) require_backend_of_device(context);
  return context;
}

std::string LayerShape::to_string() const {
  std::string text;
  for (const std::int64_t size : {num_tokens, hidden_size, intermediate_size, num_experts, top_k}) {
    text += (text.empty() ? "" : ",") + std::to_string(size);
  }
  return text;
}

LayerShape parse_layer_shape(const std::string& text) {
  const auto fail = [&]() -> Error {
    return usage_error("--shape", "T,d,n,E,K: five positive integers with K <= E", text);
  };
  std::array<std::int64_t, 5> sizes{};
  std::size_t count = 0;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t comma = std::min(text.find(',', begin), text.size());
    const auto value = parse_integer(std::string_view(text).substr(begin, comma - begin));
    if (count == sizes.size() || !value || *value < 1 || *value > (std::int64_t{1} << 31)) {
      throw fail();
    }
    sizes[count++] = *value;
    begin = comma + 1;
  }
  if (count != sizes.size() || sizes[4] > sizes[3]) throw fail();
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
}

DType parse_float_dtype(const std::string& text) {
  if (text == "float32" || text == "fp32") return DType::kFloat32;
  if (text == "bfloat16" || text == "bf16") return DType::kBFloat16;
  throw usage_error("--dtype", "float32 or bfloat16", text);
}

std::size_t parse_bytes(const std::string& option, const std::string& text) {
  static constexpr std::array<std::pair<std::string_view, double>, 10> kUnits{{
      {"", 1.0},
      {"B", 1.0},
      {"KB", 1e3},
      {"MB", 1e6},
      {"GB", 1e9},
      {"TB", 1e12},
      {"KiB", 1024.0},
      {"MiB", 1048576.0},
      {"GiB", 1073741824.0},
      {"TiB", 1099511627776.0},
  }};
  double value = 0.0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc() && std::isfinite(value) && value >= 0.0) {
    const std::string_view suffix(end, static_cast<std::size_t>(text.data() + text.size() - end));
    for (const auto& [unit, factor] : kUnits) {
      if (suffix == unit && value * factor < 1e18) return static_cast<std::size_t>(value * factor);
    }
  }
  throw usage_error(option, "bytes such as 1048576, 512MiB or 80GB", text);
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
