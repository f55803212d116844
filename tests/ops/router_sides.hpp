// What the router's tests over all backends share: a target and the host as two sides of a
// comparison.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "core/backend.hpp"
#include "rig/random.hpp"
#include "rig/target.hpp"
#include "rig/tensor.hpp"
#include "sonicmoe/sonicmoe.hpp"

namespace sonicmoe::rig {

using Values = std::vector<double>;

inline Context host_context() {
  Context context;
  context.backend = "reference";
  context.num_threads = 1;
  return context;
}

inline std::string target_name(const ::testing::TestParamInfo<Target>& info) {
  return info.param.backend + (info.param.device.type == DeviceType::kCuda ? "_cuda" : "_cpu");
}

// One side of a comparison: a context and the memory its tensors lie in.
struct Side {
  const Target& target;
  Context context;

  static Side host() { return {host_target(), host_context()}; }
  static Side device(const Target& target) { return {target, target.context(3)}; }

  Tensor input(DType dtype, std::vector<std::int64_t> shape, const Values& values) const {
    Tensor tensor(target, dtype, std::move(shape));
    tensor.fill(values);
    return tensor;
  }
  Tensor floats(std::vector<std::int64_t> shape, const Values& values) const {
    return input(DType::kFloat32, std::move(shape), values);
  }
  Tensor ids(DType dtype, std::vector<std::int64_t> shape, const Values& values) const {
    Tensor tensor(target, dtype, std::move(shape));
    tensor.fill_ids(std::vector<std::int64_t>(values.begin(), values.end()));
    return tensor;
  }
  Tensor output(DType dtype, std::vector<std::int64_t> shape) const {
    return Tensor(target, dtype, std::move(shape));
  }
};

inline void expect_output(const Tensor& tensor) { EXPECT_EQ(tensor.violation_as_output(), ""); }

// |actual - expected| <= tolerance * max|expected|, and something to compare.
inline void expect_close(const Values& actual, const Values& expected, double tolerance) {
  ASSERT_EQ(actual.size(), expected.size());
  double largest = 0.0;
  for (const double value : expected) largest = std::max(largest, std::abs(value));
  ASSERT_GT(largest, 0.0);
  for (std::size_t i = 0; i < actual.size(); ++i) {
    ASSERT_LE(std::abs(actual[i] - expected[i]), tolerance * largest)
        << "element " << i << ": " << actual[i] << ", expected " << expected[i];
  }
}

// Logits whose experts differ in popularity, so that row counts differ; `ties` rounds them so that
// many are equal.
inline Values make_logits(std::int64_t num_tokens, std::int64_t num_experts, double skew, bool ties,
                          std::uint64_t seed) {
  Random random(seed);
  Values values;
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    for (std::int64_t e = 0; e < num_experts; ++e) {
      const double value =
          1.5 * random.normal() + skew * static_cast<double>(e) / static_cast<double>(num_experts);
      values.push_back(static_cast<float>(ties ? std::round(2 * value) / 2 : value));
    }
  }
  return values;
}

inline constexpr double kOneRounding = 1.5e-7;  // relative to the largest: two float32 roundings

}  // namespace sonicmoe::rig
