#include "rig/checks.hpp"

#include <new>
#include <system_error>

#include "sonicmoe/error.hpp"

namespace sonicmoe::rig {

std::span<const CheckOperation> check_operations() {
  static constexpr CheckOperation kOperations[] = {
      {"moe", check_moe},
      {"moe_sorted", check_moe_sorted},
      {"moe_pairs", check_moe_pairs},
      {"moe_layer", check_moe_layer},
      {"route", check_route},
      {"round_tokens", check_round_tokens},
      {"round_select", check_round_select},
      {"load_balancing_loss", check_load_balancing_loss},
      {"router_z_loss", check_router_z_loss},
      {"update_expert_bias", check_update_expert_bias},
  };
  return kOperations;
}

Finding run_check(const CheckOperation& operation, const Target& target, std::uint64_t seed) {
  Finding finding;
  try {
    operation.run(target, seed, finding);
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::system_error&) {
    throw;
  } catch (const OutOfMemory&) {
    throw std::bad_alloc();
  } catch (const std::exception& error) {
    finding.problems.push_back(std::string("exception: ") + error.what());
  }
  return finding;
}

}  // namespace sonicmoe::rig
