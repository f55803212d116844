// The problem lists of bench/problems.json.
#pragma once

#include <string>
#include <vector>

#include "cli/parsers.hpp"

namespace sonicmoe::cli {

struct Problem {
  std::string name;
  LayerShape shape;
};

struct Suite {
  std::string name;
  std::vector<DType> dtypes;  ///< the suite's own choice where --dtype is not given
  std::vector<Problem> problems;
};

std::vector<std::string> suite_names();
/// `name` is one of suite_names().
Suite find_suite(const std::string& name);

}  // namespace sonicmoe::cli
