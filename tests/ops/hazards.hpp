// What hazards_test.cpp and specs_test.cpp share: the comparison with the oracle and small cases.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <string>

#include "rig/compare.hpp"
#include "rig/moe_run.hpp"

namespace sonicmoe::rig {

using Form = MoEShape::Form;

class Hazards : public ::testing::TestWithParam<Target> {
 protected:
  /// Holds a run of the fitted case against the oracle, and returns it.
  RunResult expect_correct(const MoECase& wanted, const RunOptions& options = {}) const {
    const MoECase c = fitted(GetParam(), wanted);
    SCOPED_TRACE(c.describe());
    RunResult result = run_moe(GetParam(), c, options);
    for (const std::string& problem : check_run(c, options, result, Strictness::kRealistic)) {
      ADD_FAILURE() << problem;
    }
    return result;
  }
};

inline MoECase small_case() {
  MoECase c;
  c.dtype = DType::kBFloat16;
  c.hidden_size = 72;
  c.intermediate_size = 40;
  return c;
}

/// `rows` rows of one expert.
inline MoECase one_expert(std::int64_t rows) {
  MoECase c = small_case();
  c.form = Form::kSorted;
  c.num_experts = 1;
  c.num_pairs = rows;
  c.seed = static_cast<std::uint64_t>(600 + rows);
  return c;
}

/// Several tiles in every direction, none of them whole.
inline MoECase many_tiles() {
  MoECase c = small_case();
  c.num_tokens = 330;
  c.num_experts = 3;
  c.hidden_size = 264;
  c.intermediate_size = 136;
  c.seed = 21;
  return c;
}

/// Calls of a test that repeats one.
inline int repeats() {
  const char* text = std::getenv("SONICMOE_REPEATS");
  return text == nullptr ? 20 : std::atoi(text);
}

}  // namespace sonicmoe::rig
