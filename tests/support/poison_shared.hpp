// Fills shared memory with NaN patterns; a kernel launched next finds them where it does not write.
#pragma once

#include <cuda_runtime_api.h>

namespace sonicmoe::testing {

/// On the default stream of the current device.
cudaError_t launch_poison_shared();

}  // namespace sonicmoe::testing
