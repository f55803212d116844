// Stands in for the header of that name on the host.
#pragma once

#include "cuda/ptx/common.cuh"

namespace sonicmoe::ptx {
enum class Major { kK, kMn };
}
