// Random routers for the router's cases of `sonicmoe check`, and the comparisons they share.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cli/check.hpp"
#include "cli/router_oracle.hpp"

namespace sonicmoe::cli {

/// float32 results of short sums; gradients are compared with central differences.
inline constexpr Tolerance kRouterTolerance{1e-5, 5e-6};

/// Options that legal calls can have, with the tensors they point to.
struct RouterCase {
  std::int64_t T, E;
  RouterOptions options;
  Tensor bias, logits;

  RouterCase(Random& random, std::int64_t fewest_tokens);
  std::string to_string() const;
  /// The same case with its tensors on a device.
  RouterCase to(Device device) const;

 private:
  void add_groups_and_bias(Random& random);
};

/// The expert ids of one token, from ids on the host.
std::vector<std::int64_t> ids_of(const Tensor& ids, std::int64_t token);
/// How often each expert occurs in the ids. Results may lie on any device, here and below.
std::vector<std::int64_t> count_ids(const Tensor& result, std::int64_t num_experts);
void set_row(Tensor& matrix, std::int64_t row, const oracle::Row& values);
/// [count] float32, all `value`.
Tensor constant(std::int64_t count, float value);

/// Each slot holds an expert as good as the definition's, and no expert twice.
void compare_top_k(Findings& findings, const RouterCase& c, const Tensor& topk_ids);
void compare_counts(Findings& findings, const std::string& name, const Tensor& result,
                    const std::vector<std::int64_t>& expected);
/// Against central differences, whose noise is about 1e-11. Where the true gradient vanishes (one
/// expert, a single renormalised weight) both sides must be as small as rounding leaves them.
void compare_gradient(Findings& findings, const Tensor& result, const Tensor& expected);

}  // namespace sonicmoe::cli
