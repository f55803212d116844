// NVTX ranges: operations and their steps by name in Nsight Systems and other tools.
//
// Always there. Without a tool a range costs a few nanoseconds on the host, so it needs no switch.
// The steps have the names that SONICMOE_LOG=dispatch prints.
#pragma once

#include <nvtx3/nvtx3.hpp>

namespace sonicmoe::cuda {

struct RangeDomain {
  static constexpr const char* name = "sonicmoe";
};

/// `const Range range("up");` names what the calling thread enqueues until the end of the scope.
using Range = nvtx3::scoped_range_in<RangeDomain>;

}  // namespace sonicmoe::cuda
