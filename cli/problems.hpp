// Layers on the command line, T,d,n,E,K, and the lists of them in bench/problems.json.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sonicmoe/moe.hpp"

namespace sonicmoe::cli {

struct LayerShape {
  std::int64_t num_tokens = 0;
  std::int64_t hidden_size = 0;
  std::int64_t intermediate_size = 0;
  std::int64_t num_experts = 0;
  std::int64_t top_k = 0;

  std::string to_string() const;
  /// Of top-K routing.
  MoEShape moe_shape(DType dtype, Activation activation) const;
  /// Its bytes, and every product on the way to them, are below 2^62. To be asked before any size
  /// is computed in integers.
  bool has_countable_bytes(Activation activation) const;
};

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
