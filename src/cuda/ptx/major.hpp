// Which index of an operand is contiguous in shared memory.
#pragma once

namespace sonicmoe::ptx {

/// The reduction (K) or the other one. The values are wgmma's transpose bits.
enum class Major : int { kK = 0, kMn = 1 };

}  // namespace sonicmoe::ptx
