// Fills shared memory with NaN patterns; a kernel launched next finds them where it does not write.
#pragma once

#include <cuda_runtime_api.h>

namespace sonicmoe::rig {

/// On the default stream of the current device.
cudaError_t launch_poison_shared();

}  // namespace sonicmoe::rig
