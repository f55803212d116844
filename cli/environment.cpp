#include "cli/environment.hpp"

#include <cstdlib>
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

void check_environment() { check("SONICMOE_LOG", one_of({"dispatch"})); }

}  // namespace sonicmoe::cli
