#include "core/log.hpp"

#include <cstdio>
#include <cstdlib>

namespace sonicmoe {
namespace {

// SONICMOE_LOG is a list of topics with commas between them.
bool asked_for(std::string_view topic) {
  const char* value = std::getenv("SONICMOE_LOG");
  for (std::string_view rest = value == nullptr ? "" : value; !rest.empty();) {
    const std::size_t comma = rest.find(',');
    if (rest.substr(0, comma) == topic) return true;
    rest.remove_prefix(comma == std::string_view::npos ? rest.size() : comma + 1);
  }
  return false;
}

thread_local DispatchLine* current_line = nullptr;

}  // namespace

DispatchLine* DispatchLine::current() noexcept { return current_line; }

DispatchLine::DispatchLine(std::string_view operation) {
  if (current_line != nullptr || !asked_for("dispatch")) return;
  line_ = "sonicmoe: dispatch: " + std::string(operation) + " -> ";
  current_line = this;
}

DispatchLine::~DispatchLine() {
  if (current_line != this) return;
  current_line = nullptr;
  if (first_) return;  // refused before anything was chosen
  line_ += '\n';
  std::fputs(line_.c_str(), stderr);
}

void DispatchLine::add(std::string_view what, std::string_view text) {
  if (!first_) line_ += "; ";
  first_ = false;
  if (!what.empty()) line_.append(what).append(": ");
  line_ += text;
}

}  // namespace sonicmoe
