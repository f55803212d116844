// Every public operation as a valid call of small random shapes (rig/call.hpp).
#pragma once

#include <cstdint>
#include <ostream>
#include <vector>

#include "rig/call.hpp"

namespace sonicmoe::rig {

/// Which of the tensors that may be left out are there.
enum class Optionals : std::uint8_t { kAll, kNone, kSome };

struct Operation {
  const char* name;
  /// Shapes, dtypes, options and contents follow from the seed. Backward calls hold what a forward
  /// call on the target has saved. Throws what the forward call throws.
  Call (*make)(const Target& target, std::uint64_t seed, Optionals optionals);
};

inline std::ostream& operator<<(std::ostream& out, const Operation& operation) {
  return out << operation.name;
}

const std::vector<Operation>& expert_operations();
const std::vector<Operation>& layer_operations();
const std::vector<Operation>& router_operations();
/// All of these.
const std::vector<Operation>& all_operations();

}  // namespace sonicmoe::rig
