// What the router's tests share: guarded buffers, a comparator, and a naive float64 derivation of
// scores, selection and weights straight from the formulas, with full sorts and no reuse.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "rig/target.hpp"
#include "rig/tensor.hpp"
#include "sonicmoe/sonicmoe.hpp"

namespace sonicmoe::router_test {

inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kInf = std::numeric_limits<float>::infinity();

inline std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

/// The backend under test: the one SONICMOE_BACKEND names, else the first.
inline const rig::Target& target() {
  static const rig::Target& chosen = []() -> const rig::Target& {
    const char* wanted = std::getenv("SONICMOE_BACKEND");
    for (const rig::Target& candidate : rig::targets()) {
      if (wanted == nullptr || candidate.backend == wanted) return candidate;
    }
    throw Error("router tests: no such backend");
  }();
  return chosen;
}
inline bool on_cpu() { return target().device.type == DeviceType::kCpu; }
inline Context context(int num_threads = 2) { return target().context(num_threads); }

/// A tensor on the target between guards; poisoned until written, so that an element left out
/// shows as NaN or as an absurd integer.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::vector<std::int64_t> shape)
      : shape_(std::move(shape)), buffer_(target(), count() * sizeof(T)) {}
  /// An input with the given elements.
  Buffer(const std::vector<T>& values, std::vector<std::int64_t> shape) : Buffer(std::move(shape)) {
    EXPECT_EQ(values.size(), count());
    assign(values);
  }
  ~Buffer() { EXPECT_TRUE(buffer_.guards_intact()) << "wrote outside of a buffer"; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void assign(const std::vector<T>& values) {
    std::vector<std::byte> bytes(values.size() * sizeof(T));
    if (!bytes.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
    buffer_.upload(bytes);
  }
  std::vector<T> values() const {
    const std::vector<std::byte> bytes = buffer_.download();
    std::vector<T> result(count());
    if (!bytes.empty()) std::memcpy(result.data(), bytes.data(), bytes.size());
    return result;
  }
  TensorView view() const { return view_as(dtype_of<T>, shape_); }
  /// The same memory under another shape or dtype of the same size, for error tests.
  TensorView view_as(DType dtype, std::vector<std::int64_t> shape) const {
    return TensorView(buffer_.data(), dtype, std::span<const std::int64_t>(shape),
                      buffer_.view().device());
  }
  TensorView reshaped(std::vector<std::int64_t> shape) const {
    return view_as(dtype_of<T>, std::move(shape));
  }

 private:
  std::size_t count() const {
    std::size_t product = 1;
    for (const std::int64_t extent : shape_) product *= at(extent);
    return product;
  }

  std::vector<std::int64_t> shape_;
  rig::GuardedBuffer buffer_;
};

/// |actual - expected| <= tolerance * max|expected| everywhere. A NaN fails, and so does all-zero
/// `actual` unless everything expected is zero.
template <class A, class B>
::testing::AssertionResult close(const std::vector<A>& actual, const std::vector<B>& expected,
                                 double tolerance) {
  if (actual.size() != expected.size()) {
    return ::testing::AssertionFailure()
           << actual.size() << " values, expected " << expected.size();
  }
  double largest = 0.0;
  for (const B value : expected) largest = std::max(largest, std::abs(double{value}));
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const double difference = std::abs(double{actual[i]} - double{expected[i]});
    if (!(difference <= tolerance * largest)) {
      return ::testing::AssertionFailure()
             << "element " << i << " of " << actual.size() << ": " << actual[i] << ", expected "
             << expected[i] << " (max|expected| " << largest << ")";
    }
  }
  return ::testing::AssertionSuccess();
}

inline constexpr double kFloatTolerance = 1.5e-7;  // one float32 rounding is 6e-8

/// Runs `call`, expects sonicmoe::Error about `argument`, and returns the message.
inline std::string error_of(const std::string& argument, const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.argument(), argument) << error.what();
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    return error.what();
  }
  ADD_FAILURE() << "no Error about " << argument;
  return {};
}

/// A problem of the router with its options in owned storage.
struct Problem {
  std::int64_t num_tokens = 0;
  std::int64_t num_experts = 1;
  RouterOptions options;
  std::vector<float> bias;    // [E] or empty
  std::vector<float> logits;  // [T, E]

  std::vector<double> row(std::int64_t t) const {
    const auto begin = logits.begin() + t * num_experts;
    return std::vector<double>(begin, begin + num_experts);
  }
};

/// The inputs of a problem on the target.
struct Inputs {
  Buffer<float> logits;
  Buffer<float> bias;
  RouterOptions options;

  explicit Inputs(const Problem& problem)
      : logits(problem.logits, {problem.num_tokens, problem.num_experts}),
        bias(problem.bias, {static_cast<std::int64_t>(problem.bias.size())}),
        options(problem.options) {
    if (!problem.bias.empty()) options.selection_bias = bias.view();
  }
};

inline std::vector<float> random_floats(std::int64_t count, std::uint64_t seed,
                                        double deviation = 1.0) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal(0.0, deviation);
  std::vector<float> values(at(count));
  for (float& value : values) value = static_cast<float>(normal(generator));
  return values;
}

// ------------------------------------------------------------------------- the naive definitions

inline double naive_sigmoid(double x) {
  return x >= 0 ? 1.0 / (1.0 + std::exp(-x)) : std::exp(x) / (1.0 + std::exp(x));
}

/// score(t,e) of every expert: softmax over E or sigmoid.
inline std::vector<double> naive_scores(Scoring scoring, const std::vector<double>& logits) {
  std::vector<double> scores(logits.size());
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (const double logit : logits) sum += std::exp(logit - largest);
  for (std::size_t e = 0; e < logits.size(); ++e) {
    scores[e] = scoring == Scoring::kSigmoidTopK ? naive_sigmoid(logits[e])
                                                 : std::exp(logits[e] - largest) / sum;
  }
  return scores;
}

/// The float32 scores that token rounding ranks by.
inline std::vector<float> naive_ranking_scores(const Problem& problem, std::int64_t token) {
  std::vector<float> ranking;
  for (const double score : naive_scores(problem.options.scoring, problem.row(token))) {
    ranking.push_back(static_cast<float>(score));
  }
  for (std::size_t e = 0; e < problem.bias.size(); ++e) ranking[e] += problem.bias[e];
  return ranking;
}

/// Indices of `values` by descending value, ties to the lower index.
template <class T>
std::vector<std::int64_t> descending(const std::vector<T>& values) {
  std::vector<std::int64_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int64_t a, std::int64_t b) { return values[at(a)] > values[at(b)]; });
  return order;
}

/// The top-K of one token, best first.
inline std::vector<std::int64_t> naive_select(const Problem& problem, std::int64_t token) {
  const RouterOptions& options = problem.options;
  if (options.scoring != Scoring::kSigmoidTopK) {
    std::vector<std::int64_t> order = descending(problem.row(token));
    order.resize(at(options.top_k));
    return order;
  }
  const std::vector<float> scores = naive_ranking_scores(problem, token);
  const std::int64_t group_size = problem.num_experts / options.num_groups;
  std::vector<float> group_scores;
  for (std::int64_t g = 0; g < options.num_groups; ++g) {
    std::vector<float> members(scores.begin() + g * group_size,
                               scores.begin() + (g + 1) * group_size);
    std::sort(members.rbegin(), members.rend());
    group_scores.push_back(group_size == 1 ? members[0] : members[0] + members[1]);
  }
  std::vector<std::int64_t> best_groups = descending(group_scores);
  best_groups.resize(at(options.top_groups));
  std::vector<std::int64_t> ids;
  for (const std::int64_t e : descending(scores)) {
    if (std::count(best_groups.begin(), best_groups.end(), e / group_size) > 0) ids.push_back(e);
  }
  ids.resize(at(options.top_k));
  return ids;
}

/// weight(t,e) for any expert, with Z_t of the top-K `ids`; `logits` [E] in float64 so that finite
/// differences can be taken.
inline double naive_weight(const RouterOptions& options, const std::vector<double>& logits,
                           const std::vector<std::int64_t>& ids, std::int64_t expert) {
  const std::vector<double> scores = naive_scores(options.scoring, logits);
  const bool sigmoid = options.scoring == Scoring::kSigmoidTopK;
  const bool renormalize = options.scoring == Scoring::kTopKSoftmax ? true
                           : options.renormalize.has_value()        ? *options.renormalize
                                                                    : sigmoid;
  double z = 1.0;
  if (renormalize) {
    z = sigmoid ? 1e-20 : 0.0;
    for (const std::int64_t id : ids) z += scores[at(id)];
  }
  return options.scale * scores[at(expert)] / z;
}

/// d/d logits of a function of one token's logits, by central differences in float64.
inline std::vector<double> finite_differences(
    std::vector<double> logits, const std::function<double(const std::vector<double>&)>& f) {
  constexpr double kStep = 1e-5;
  std::vector<double> gradient;
  for (double& logit : logits) {
    const double center = logit;
    logit = center + kStep;
    const double above = f(logits);
    logit = center - kStep;
    const double below = f(logits);
    logit = center;
    gradient.push_back((above - below) / (2 * kStep));
  }
  return gradient;
}

/// Configurations that cover the scorings, renormalisation, bias, groups and scale.
struct Config {
  std::string name;
  std::int64_t num_tokens, num_experts, top_k;
  Scoring scoring;
  std::optional<bool> renormalize = {};
  bool bias = false;
  std::int64_t num_groups = 1, top_groups = 1;
  float scale = 1.0f;

  Problem problem(std::uint64_t seed = 1, double deviation = 1.5) const {
    Problem result;
    result.num_tokens = num_tokens;
    result.num_experts = num_experts;
    result.options.top_k = top_k;
    result.options.scoring = scoring;
    result.options.renormalize = renormalize;
    result.options.num_groups = num_groups;
    result.options.top_groups = top_groups;
    result.options.scale = scale;
    result.logits = random_floats(num_tokens * num_experts, seed, deviation);
    if (bias) result.bias = random_floats(num_experts, seed + 1000, 0.5);
    return result;
  }
};

inline void PrintTo(const Config& config, std::ostream* out) { *out << config.name; }

inline std::vector<Config> all_configs() {
  using enum Scoring;
  return {
      {"topk_softmax", 70, 12, 3, kTopKSoftmax},
      {"topk_softmax_scaled", 65, 16, 4, kTopKSoftmax, true, false, 1, 1, 2.5f},
      {"softmax_topk_default", 70, 12, 3, kSoftmaxTopK},
      {"softmax_topk_off", 33, 32, 8, kSoftmaxTopK, false, false, 1, 1, 0.5f},
      {"softmax_topk_renormalized", 130, 12, 4, kSoftmaxTopK, true},
      {"sigmoid_topk_default", 70, 12, 3, kSigmoidTopK},
      {"sigmoid_topk_off", 64, 12, 3, kSigmoidTopK, false, false, 1, 1, 3.0f},
      {"sigmoid_topk_bias", 70, 16, 4, kSigmoidTopK, true, true, 1, 1, 2.5f},
      {"sigmoid_topk_groups", 129, 16, 4, kSigmoidTopK, true, true, 4, 2, 2.5f},
      {"sigmoid_topk_groups_off", 40, 18, 5, kSigmoidTopK, false, true, 6, 2},
      {"sigmoid_topk_groups_of_one", 40, 8, 3, kSigmoidTopK, {}, true, 8, 3},
      {"one_choice", 40, 10, 1, kSoftmaxTopK},
      {"one_choice_renormalized", 40, 10, 1, kTopKSoftmax},
      {"all_experts", 40, 6, 6, kSoftmaxTopK},
      {"all_experts_topk_softmax", 40, 6, 6, kTopKSoftmax},
      {"all_experts_sigmoid", 40, 6, 6, kSigmoidTopK, {}, true},
      {"one_expert", 40, 1, 1, kSoftmaxTopK},
      {"one_expert_sigmoid", 40, 1, 1, kSigmoidTopK, false},
      {"many_experts", 20, 200, 8, kTopKSoftmax},
  };
}

inline std::string config_name(const ::testing::TestParamInfo<Config>& info) {
  return info.param.name;
}

/// The inputs and outputs of route_forward.
template <class Id>
struct Routed {
  Inputs inputs;
  Buffer<Id> ids;
  Buffer<float> weights;
  Buffer<std::int32_t> rows;

  explicit Routed(const Problem& problem, int num_threads = 2)
      : inputs(problem),
        ids({problem.num_tokens, problem.options.top_k}),
        weights({problem.num_tokens, problem.options.top_k}),
        rows({problem.num_experts}) {
    RouteForwardArgs args;
    args.options = inputs.options;
    args.logits = inputs.logits.view();
    args.topk_ids = ids.view();
    args.topk_weights = weights.view();
    args.rows_per_expert = rows.view();
    route_forward(context(num_threads), args);
  }
};

}  // namespace sonicmoe::router_test
