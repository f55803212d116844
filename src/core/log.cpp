#include "core/log.hpp"

#include <cstdio>
#include <cstdlib>

namespace sonicmoe {

bool log_dispatch_enabled() {
  const char* topics = std::getenv("SONICMOE_LOG");
  return topics != nullptr && std::string_view(topics).find("dispatch") != std::string_view::npos;
}

void log_dispatch(std::string_view operation, const std::string& message) {
  if (!log_dispatch_enabled()) return;
  const std::string line =
      "sonicmoe: dispatch: " + std::string(operation) + " -> " + message + "\n";
  std::fputs(line.c_str(), stderr);
}

}  // namespace sonicmoe
