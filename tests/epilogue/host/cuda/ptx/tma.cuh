// Stands in for the header of that name on the host.
#pragma once

#include "cuda/ptx/common.cuh"
#include "host_memory.hpp"

namespace sonicmoe::ptx {

inline void prefetch_tensormap(const CUtensorMap*) {}
inline void tma_load(uint32_t to, const CUtensorMap* map, uint32_t, int column, int, int row) {
  host::copies.push_back({to, map, column, row});  // lane 0 issues them for all lanes
}
inline void tma_store(const CUtensorMap*, uint32_t, int, int, int) {}  // likewise
inline void tma_store_evict_first(const CUtensorMap*, uint32_t, int, int, int) {}
inline void bulk_commit_group() {}
template <int kGroups>
inline void bulk_wait_group_read() {}

}  // namespace sonicmoe::ptx
