#include "rig/call.hpp"

#include <algorithm>
#include <cmath>

#include "rig/moe_run.hpp"
#include "sonicmoe/error.hpp"

namespace sonicmoe::rig {

Outcome Call::run() const {
  try {
    invoke_();
  } catch (const Error& error) {
    return {true, error.argument(), error.what()};
  }
  return {};
}

void Call::restore_memory(bool scratch_too) {
  for (const Operand& operand : operands) {
    if (operand.is_result() || (operand.written() && scratch_too)) operand.memory->restore();
  }
}

Elements Call::results() const {
  Elements elements;
  for (const Operand& operand : operands) {
    if (operand.is_result()) elements.push_back(operand.memory->values());
  }
  return elements;
}

std::string Call::change(bool scratch_too) const {
  for (const Operand& operand : operands) {
    if (operand.name == "workspace" && !scratch_too) continue;
    const std::string what = operand.memory->violation_as_input();
    if (!what.empty()) return operand.name + ": " + what;
  }
  return {};
}

std::string Call::violation() const {
  for (const Operand& operand : operands) {
    const std::string what = operand.written() ? operand.memory->violation_as_output()
                                               : operand.memory->violation_as_input();
    if (!what.empty()) return operand.name + ": " + what;
  }
  return {};
}

const Operand* Call::find(const std::string& name) const {
  for (const Operand& operand : operands) {
    if (operand.name == name) return &operand;
  }
  return nullptr;
}

void Call::set_optional(const std::string& name, double neutral) {
  for (Operand& operand : operands) {
    if (operand.name != name) continue;
    operand.optional = true;
    operand.neutral = neutral;
  }
}

bool Call::has_argument(const std::string& name) const {
  const auto is_option = [&](const Setting& setting) { return setting.option == name; };
  const std::vector<std::string> sizes = {"num_tokens", "num_experts", "num_pairs", "hidden_size",
                                          "intermediate_size"};
  return find(name) != nullptr || std::any_of(settings.begin(), settings.end(), is_option) ||
         std::find(sizes.begin(), sizes.end(), name) != sizes.end();
}

std::string difference(const Call& call, const Elements& actual, const Elements& expected,
                       double rounding) {
  std::size_t next = 0;
  for (const Operand& operand : call.operands) {
    if (!operand.is_result()) continue;
    std::vector<double> a = actual[next], b = expected[next];
    ++next;
    double largest = 0.0;
    for (const double value : b) largest = std::max(largest, std::abs(value));
    for (std::size_t i = 0; i < a.size() && i < b.size(); ++i) {
      a[i] += 0.0, b[i] += 0.0;
      if (std::abs(a[i] - b[i]) <= rounding * largest) a[i] = b[i];
    }
    const std::string text = bitwise_difference(a, b);
    if (!text.empty()) return operand.name + ": " + text;
  }
  return {};
}

}  // namespace sonicmoe::rig
