#include "cli/problems.hpp"

#include <nlohmann/json.hpp>

#include "cli/parsers.hpp"
#include "problems_json.hpp"

namespace sonicmoe::cli {
namespace {

const nlohmann::json& suites() {
  static const nlohmann::json parsed = nlohmann::json::parse(kProblemsJson).at("suites");
  return parsed;
}

}  // namespace

std::string LayerShape::to_string() const {
  std::vector<std::string> sizes;
  for (const std::int64_t size : {num_tokens, hidden_size, intermediate_size, num_experts, top_k}) {
    sizes.push_back(std::to_string(size));
  }
  return join(sizes, ",");
}

MoEShape LayerShape::moe_shape(DType dtype, Activation activation) const {
  MoEShape shape;
  shape.num_tokens = num_tokens;
  shape.hidden_size = hidden_size;
  shape.intermediate_size = intermediate_size;
  shape.num_experts = num_experts;
  shape.num_pairs = num_tokens * top_k;
  shape.activation = activation;
  shape.numerics = Numerics::of(dtype);
  return shape;
}

bool LayerShape::has_countable_bytes(Activation activation) const {
  const double T = static_cast<double>(num_tokens), d = static_cast<double>(hidden_size);
  const double n = static_cast<double>(intermediate_size), E = static_cast<double>(num_experts);
  const double K = static_cast<double>(top_k), g = gate_factor(activation);
  const double parameters = E * d * ((g + 1) * n + 1);        // with the router's
  const double rows = T * K * (2 * (g + 1) * n + 2 * d + 8);  // H, A, dH, A', Y, dX~, indices
  const double tokens = T * (4 * d + E);                      // X, O, dO, dX, logits
  constexpr double kBytesPerElement = 16;                     // weight, gradient, states
  return kBytesPerElement * (parameters + rows + tokens) < 0x1p62;
}

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
