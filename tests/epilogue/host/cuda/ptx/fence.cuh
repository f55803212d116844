// Stands in for the header of that name on the host.
#pragma once

namespace sonicmoe::ptx {
inline void fence_proxy_async_shared() {}
}  // namespace sonicmoe::ptx
