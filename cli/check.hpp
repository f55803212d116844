// The cases of `sonicmoe check`: one function per operation, each a pure function of its seed.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "cli/random.hpp"
#include "cli/tensor.hpp"
#include "sonicmoe/context.hpp"

namespace sonicmoe::cli {

/// Bounds of the error of a tensor, relative to max |reference|.
struct Tolerance {
  double max;  ///< of the worst element
  double rms;  ///< of the root mean square

  /// For results stored in `dtype`. bfloat16 has 8 bits of significand; a result passes through
  /// about four roundings, so the typical error is 0.3% and zeros (an error of 1) never pass.
  static Tolerance of(DType dtype) {
    return dtype == DType::kFloat32 ? Tolerance{1e-5, 5e-6} : Tolerance{2e-2, 1e-2};
  }
};

/// What one case found. Results that are compared may lie on any device, references on the host.
class Findings {
 public:
  std::string description;  ///< the case in words

  bool passed() const noexcept { return problems_.empty(); }
  const std::vector<std::string>& problems() const noexcept { return problems_; }
  void add(std::string problem) { problems_.push_back(std::move(problem)); }
  void require(bool condition, const std::string& problem) {
    if (!condition) add(problem);
  }

  /// The first `count` elements of `result` in storage order against `expected`. Also a problem:
  /// NaN, overwritten guard bytes, and a larger reference of nothing but zeros where `may_vanish`
  /// is false (then the case proves nothing).
  void compare(const std::string& name, const Tensor& result, const Tensor& expected,
               const Tolerance& tolerance, bool may_vanish, std::size_t count);
  void compare(const std::string& name, const Tensor& result, const Tensor& expected,
               const Tolerance& tolerance, bool may_vanish = false) {
    compare(name, result, expected, tolerance, may_vanish, result.count());
  }
  /// Bit for bit.
  void same_bits(const std::string& name, const Tensor& one, const Tensor& other);

 private:
  std::vector<std::string> problems_;
};

using CheckCase = Findings (*)(const Context& context, Random& random);

struct CheckOperation {
  const char* name;
  CheckCase run;
};

/// The context of the reference backend.
inline Context reference_context() {
  Context context;
  context.backend = "reference";
  return context;
}

// check_experts.cpp
Findings check_moe(const Context& context, Random& random);
Findings check_moe_sorted(const Context& context, Random& random);
Findings check_moe_pairs(const Context& context, Random& random);
// check_layer.cpp
Findings check_moe_layer(const Context& context, Random& random);
// check_router.cpp
Findings check_route(const Context& context, Random& random);
Findings check_round_tokens(const Context& context, Random& random);
Findings check_round_select(const Context& context, Random& random);
Findings check_load_balancing_loss(const Context& context, Random& random);
Findings check_router_z_loss(const Context& context, Random& random);
Findings check_update_expert_bias(const Context& context, Random& random);

std::span<const CheckOperation> check_operations();

}  // namespace sonicmoe::cli
