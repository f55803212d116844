#include "cli/router_oracle.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <numeric>

namespace sonicmoe::cli::oracle {
namespace {

double sigmoid(double v) { return 1.0 / (1.0 + std::exp(-v)); }

double at(const Row& row, std::int64_t i) { return row[static_cast<std::size_t>(i)]; }

// Sum of the two largest scores of each group (of the one, where a group has one expert).
Row group_scores(const Row& selection, std::int64_t num_groups) {
  const auto size = selection.size() / static_cast<std::size_t>(num_groups);
  Row groups;
  for (std::size_t begin = 0; begin < selection.size(); begin += size) {
    Row members(selection.begin() + static_cast<std::ptrdiff_t>(begin),
                selection.begin() + static_cast<std::ptrdiff_t>(begin + size));
    std::sort(members.rbegin(), members.rend());
    groups.push_back(members[0] + (size > 1 ? members[1] : 0.0));
  }
  return groups;
}

}  // namespace

Row logits_row(const Tensor& logits, std::int64_t token) {
  const std::int64_t E = logits.view().size(1);
  const float* row = logits.as<float>() + token * E;
  return Row(row, row + E);
}

Row scores(Scoring scoring, const Row& logits) {
  Row result;
  if (scoring == Scoring::kSigmoidTopK) {
    for (const double logit : logits) result.push_back(sigmoid(logit));
    return result;
  }
  const double highest = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (const double logit : logits) sum += std::exp(logit - highest);
  for (const double logit : logits) result.push_back(std::exp(logit - highest) / sum);
  return result;
}

Row selection_scores(const RouterOptions& options, const Row& logits) {
  Row selection = scores(options.scoring, logits);
  if (options.selection_bias.defined()) {
    for (std::size_t e = 0; e < selection.size(); ++e) {
      selection[e] += static_cast<double>(options.selection_bias.as<float>()[e]);
    }
  }
  if (options.num_groups > 1) {
    const auto size = selection.size() / static_cast<std::size_t>(options.num_groups);
    const auto best = top_k(group_scores(selection, options.num_groups), options.top_groups);
    for (std::size_t e = 0; e < selection.size(); ++e) {
      const auto group = static_cast<std::int64_t>(e / size);
      if (std::find(best.begin(), best.end(), group) == best.end()) {
        selection[e] = -std::numeric_limits<double>::infinity();
      }
    }
  }
  return selection;
}

std::vector<std::int64_t> top_k(const Row& selection, std::int64_t k) {
  std::vector<std::int64_t> order(selection.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
    return at(selection, a) > at(selection, b);
  });
  order.resize(static_cast<std::size_t>(k));
  return order;
}

double weight(const RouterOptions& options, const Row& logits, const std::vector<std::int64_t>& ids,
              std::int64_t expert) {
  const Row s = scores(options.scoring, logits);
  double z = 1.0;
  if (options.renormalizes()) {
    z = options.scoring == Scoring::kSigmoidTopK ? 1e-20 : 0.0;
    for (const std::int64_t id : ids) z += at(s, id);
  }
  return static_cast<double>(options.scale) * at(s, expert) / z;
}

Row gradient(const std::function<double(const Row&)>& f, Row logits) {
  constexpr double kStep = 1e-4;
  Row result;
  for (std::size_t e = 0; e < logits.size(); ++e) {
    const double middle = logits[e];
    logits[e] = middle + kStep;
    const double above = f(logits);
    logits[e] = middle - kStep;
    const double below = f(logits);
    logits[e] = middle;
    result.push_back((above - below) / (2.0 * kStep));
  }
  return result;
}

std::vector<std::int64_t> rounded_rows(RoundingPolicy policy, std::int64_t tile,
                                       std::int64_t num_tokens,
                                       const std::vector<std::int64_t>& rows,
                                       const std::vector<bool>& up_changes_less) {
  std::vector<std::int64_t> result;
  std::int64_t carry = 0;
  for (std::size_t e = 0; e < rows.size(); ++e) {
    const std::int64_t down = rows[e] / tile * tile;
    const std::int64_t up = (rows[e] + tile - 1) / tile * tile;
    const bool nearest_up =
        up - rows[e] != rows[e] - down ? up - rows[e] < rows[e] - down : (up / tile) % 2 == 0;
    bool take_up = nearest_up;
    if (policy == RoundingPolicy::kUp) take_up = true;
    if (policy == RoundingPolicy::kDown) take_up = false;
    if (policy == RoundingPolicy::kNearestScore) take_up = up_changes_less[e];
    if (policy == RoundingPolicy::kBalanced) {
      const std::int64_t after_up = std::abs(carry + up - rows[e]);
      const std::int64_t after_down = std::abs(carry + down - rows[e]);
      take_up = after_up != after_down ? after_up < after_down : nearest_up;
    }
    const std::int64_t chosen = take_up && up <= num_tokens ? up : down;
    carry += chosen - rows[e];
    result.push_back(policy == RoundingPolicy::kStochastic ? rows[e] : chosen);
  }
  return result;
}

}  // namespace sonicmoe::cli::oracle
