// Random cases of every operation, each compared with the float64 oracle: what `sonicmoe check` and
// the fuzzer run.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "rig/target.hpp"

namespace sonicmoe::rig {

struct Finding {
  std::string description;            ///< the case in words
  std::vector<std::string> problems;  ///< none: passed
};

struct CheckOperation {
  const char* name;
  /// The case is a pure function of the seed. `finding.description` is set before anything runs.
  void (*run)(const Target& target, std::uint64_t seed, Finding& finding);
};

/// moe, moe_sorted, moe_pairs, moe_layer and the router's, in this order.
std::span<const CheckOperation> check_operations();

/// Runs a case; an exception in the middle of it is a finding. Errors: std::bad_alloc and
/// std::system_error, since lack of memory or threads says nothing about the operation.
Finding run_check(const CheckOperation& operation, const Target& target, std::uint64_t seed);

// The cases, by file.
void check_moe(const Target& target, std::uint64_t seed, Finding& finding);
void check_moe_sorted(const Target& target, std::uint64_t seed, Finding& finding);
void check_moe_pairs(const Target& target, std::uint64_t seed, Finding& finding);
void check_moe_layer(const Target& target, std::uint64_t seed, Finding& finding);
void check_route(const Target& target, std::uint64_t seed, Finding& finding);
void check_round_tokens(const Target& target, std::uint64_t seed, Finding& finding);
void check_round_select(const Target& target, std::uint64_t seed, Finding& finding);
void check_load_balancing_loss(const Target& target, std::uint64_t seed, Finding& finding);
void check_router_z_loss(const Target& target, std::uint64_t seed, Finding& finding);
void check_update_expert_bias(const Target& target, std::uint64_t seed, Finding& finding);

}  // namespace sonicmoe::rig
