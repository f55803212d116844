#include "cli/problems.hpp"

#include <nlohmann/json.hpp>

#include "problems_json.hpp"

namespace sonicmoe::cli {
namespace {

const nlohmann::json& suites() {
  static const nlohmann::json parsed = nlohmann::json::parse(kProblemsJson).at("suites");
  return parsed;
}

}  // namespace

std::vector<std::string> suite_names() {
  std::vector<std::string> names;
  for (const auto& [name, suite] : suites().items()) names.push_back(name);
  return names;
}

Suite find_suite(const std::string& name) {
  const nlohmann::json& entry = suites().at(name);
  Suite suite{name, {}, {}};
  for (const auto& dtype : entry.at("dtypes")) {
    suite.dtypes.push_back(
        parse_value("bench/problems.json", float_dtype(), dtype.get<std::string>()));
  }
  for (const auto& problem : entry.at("problems")) {
    const auto sizes = problem.at("shape").get<std::vector<std::int64_t>>();
    suite.problems.push_back({problem.at("name").get<std::string>(),
                              {sizes.at(0), sizes.at(1), sizes.at(2), sizes.at(3), sizes.at(4)}});
  }
  return suite;
}

}  // namespace sonicmoe::cli
