#include "cli/environment.hpp"

#include <cstdlib>
#include <limits>
#include <vector>

#include "cli/parsers.hpp"

namespace sonicmoe::cli {
namespace {

template <class T>
void check(const char* name, const Parser<T>& parser) {
  if (const auto value = environment_variable(name)) parse_value(name, parser, *value);
}

}  // namespace

std::optional<std::string> environment_variable(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return {};
  return value;
}

void check_environment() {
  const Parser<int> count = integer(0, std::numeric_limits<int>::max());
  check("SONICMOE_LOG", one_of({"dispatch"}));
  check("SONICMOE_CUDA_BLOCK_N", one_of({"128", "256"}));
  check("SONICMOE_CUDA_HIDDEN_STORERS", one_of({"two", "three", "math"}));
  check("SONICMOE_CUDA_GRID", count);
  check("SONICMOE_CUDA_ADD_WINDOW", count);
}

}  // namespace sonicmoe::cli
