// Stands in for the header of that name on the host.
#pragma once

#include "cuda/ptx/common.cuh"
#include "host_memory.hpp"

namespace sonicmoe::ptx {

inline uint4 load_shared_v4(uint32_t address) { return host::load<uint4>(address); }
inline uint2 load_shared_v2(uint32_t address) { return host::load<uint2>(address); }
inline uint4 load_global_nc_v4(const void* address) {
  uint4 value;
  const auto* first = static_cast<const __nv_bfloat16*>(address);
  if (first < host::readable.begin || first + 8 > host::readable.end) {
    throw std::runtime_error("read out of bounds");
  }
  host::require_aligned(reinterpret_cast<std::uintptr_t>(address), sizeof(value));
  std::memcpy(&value, address, sizeof(value));
  return value;
}
inline void store_global_v4(void* address, const uint4& v) { host::store(address, v); }
inline void store_global_streaming_v4(void* address, const uint4& v) { host::store(address, v); }
inline void store_global_v2(void* address, uint32_t x, uint32_t y) {
  host::store(address, uint2{x, y});
}
inline void reduce_add_bf16x2_v4(void*, const uint4&) {}  // store.cuh names it; not called here
inline void await_value(uint32_t) {}

}  // namespace sonicmoe::ptx
