// A layer on the command line: T,d,n,E,K.
#pragma once

#include <cstdint>
#include <string>

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

}  // namespace sonicmoe::cli
