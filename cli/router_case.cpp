#include "cli/router_case.hpp"

#include <algorithm>
#include <cmath>
#include <set>

namespace sonicmoe::cli {
namespace {

constexpr double kNearTie = 1e-6;  // scores this close may be ordered either way in float32

}  // namespace

RouterCase::RouterCase(Random& random, std::int64_t fewest_tokens)
    : T(random.integer(fewest_tokens, 48)), E(random.integer(1, 24)) {
  options.top_k = random.integer(1, std::min<std::int64_t>(E, 6));
  options.scoring = static_cast<Scoring>(random.integer(0, 2));
  if (options.scoring != Scoring::kTopKSoftmax && random.chance(0.6)) {
    options.renormalize = random.chance(0.5);
  }
  options.scale = random.chance(0.5) ? 1.0f : 2.5f;
  if (options.scoring == Scoring::kSigmoidTopK) add_groups_and_bias(random);
  logits = Tensor(DType::kFloat32, {T, E});
  for (std::size_t i = 0; i < logits.count(); ++i) {
    logits.set(i, static_cast<float>(random.normal()));
  }
}

void RouterCase::add_groups_and_bias(Random& random) {
  if (random.chance(0.5)) {
    const std::int64_t groups = random.integer(2, 4);
    E = groups * random.integer(1, 6);
    options.num_groups = groups;
    options.top_groups = random.integer(1, groups);
    options.top_k = random.integer(1, std::min<std::int64_t>(options.top_groups * E / groups, 6));
  }
  if (random.chance(0.5)) {
    bias = Tensor(DType::kFloat32, {E});
    bias.fill_random(random, 0.2);
    options.selection_bias = bias.view();
  }
}

std::string RouterCase::to_string() const {
  return "T=" + std::to_string(T) + " E=" + std::to_string(E) +
         " K=" + std::to_string(options.top_k) + " " + std::string(name_of(options.scoring)) +
         (options.renormalizes() ? " renormalize" : "") +
         (options.num_groups > 1 ? " groups=" + std::to_string(options.top_groups) + "/" +
                                       std::to_string(options.num_groups)
                                 : "") +
         (bias.defined() ? " bias" : "");
}

RouterCase RouterCase::to(Device device) const {
  RouterCase copy = *this;
  copy.logits = logits.to(device);
  copy.bias = bias.to(device);
  copy.options.selection_bias = copy.bias.view();
  return copy;
}

std::vector<std::int64_t> ids_of(const Tensor& ids, std::int64_t token) {
  const std::int64_t K = ids.view().size(1);
  std::vector<std::int64_t> row;
  for (std::int64_t k = 0; k < K; ++k) {
    const auto i = static_cast<std::size_t>(token * K + k);
    row.push_back(ids.dtype() == DType::kInt64 ? ids.as<std::int64_t>()[i]
                                               : std::int64_t{ids.as<std::int32_t>()[i]});
  }
  return row;
}

void compare_top_k(Findings& findings, const RouterCase& c, const Tensor& topk_ids) {
  const Tensor ids = topk_ids.to_host();
  for (std::int64_t t = 0; t < c.T; ++t) {
    const auto selection = oracle::selection_scores(c.options, oracle::logits_row(c.logits, t));
    const auto expected = oracle::top_k(selection, c.options.top_k);
    const auto actual = ids_of(ids, t);
    bool good = std::set<std::int64_t>(actual.begin(), actual.end()).size() == actual.size();
    for (std::size_t k = 0; good && k < actual.size(); ++k) {
      good = actual[k] >= 0 && actual[k] < c.E &&
             std::abs(selection[static_cast<std::size_t>(actual[k])] -
                      selection[static_cast<std::size_t>(expected[k])]) <= kNearTie;
    }
    if (!good) return findings.add("topk_ids: wrong experts at token " + std::to_string(t));
  }
}

void compare_counts(Findings& findings, const std::string& name, const Tensor& result,
                    const std::vector<std::int64_t>& expected) {
  const Tensor counts = result.to_host();
  for (std::size_t e = 0; e < expected.size(); ++e) {
    if (counts.as<std::int32_t>()[e] != expected[e]) {
      return findings.add(name + ": expert " + std::to_string(e) + " has " +
                          std::to_string(counts.as<std::int32_t>()[e]) + ", expected " +
                          std::to_string(expected[e]));
    }
  }
}

std::vector<std::int64_t> count_ids(const Tensor& result, std::int64_t E) {
  const Tensor ids = result.to_host();
  std::vector<std::int64_t> counts(static_cast<std::size_t>(E), 0);
  for (std::size_t i = 0; i < ids.count(); ++i) {
    const std::int64_t id = ids.dtype() == DType::kInt64 ? ids.as<std::int64_t>()[i]
                                                         : std::int64_t{ids.as<std::int32_t>()[i]};
    if (id >= 0 && id < E) ++counts[static_cast<std::size_t>(id)];
  }
  return counts;
}

void set_row(Tensor& matrix, std::int64_t row, const oracle::Row& values) {
  for (std::size_t e = 0; e < values.size(); ++e) {
    matrix.set(static_cast<std::size_t>(row) * values.size() + e, static_cast<float>(values[e]));
  }
}

Tensor constant(std::int64_t count, float value) {
  Tensor tensor(DType::kFloat32, {count});
  tensor.fill(value);
  return tensor;
}

void compare_gradient(Findings& findings, const Tensor& result, const Tensor& expected) {
  const Tensor actual = result.to_host();
  constexpr float kVanishing = 1e-7f;
  float largest = 0.0f;
  for (std::size_t i = 0; i < expected.count(); ++i) {
    largest = std::max(largest, std::abs(expected.at(i)));
  }
  if (largest > kVanishing) {
    return findings.compare("grad_logits", actual, expected, kRouterTolerance);
  }
  for (std::size_t i = 0; i < actual.count(); ++i) {
    if (!(std::abs(actual.at(i)) <= 10 * kVanishing)) {
      return findings.add("grad_logits: expected a vanishing gradient, got " +
                          std::to_string(actual.at(i)));
    }
  }
}

}  // namespace sonicmoe::cli
