// Functions for both sides, in headers that the host's compiler reads too.
#pragma once

#ifdef __CUDACC__
#define SONICMOE_HOST_DEVICE __host__ __device__
#else
#define SONICMOE_HOST_DEVICE
#endif
