// Bulk copies: cp.async.bulk.tensor loads (tiles described by a tensor map), their multicast form,
// and the plain bulk copies and reductions. All are issued by one thread.
#pragma once

#include <cuda.h>

#include "cuda/ptx/common.cuh"

namespace sonicmoe::ptx {

// Brings a tensor map (a __grid_constant__ kernel parameter) into the descriptor cache.
SONICMOE_DEVICE void prefetch_tensormap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Loads the map's box at coordinates (c0, c1, ...), c0 innermost, in elements. Elements outside the
// tensor arrive as zeros and count as bytes. `destination` is 128-byte aligned (1024 for the
// 128-byte swizzle pattern to start at row 0); completion adds the box's bytes to `barrier`.
SONICMOE_DEVICE void tma_load(uint32_t destination, const CUtensorMap* map, uint32_t barrier,
                              int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1)
      : "memory");
}

SONICMOE_DEVICE void tma_load(uint32_t destination, const CUtensorMap* map, uint32_t barrier,
                              int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

SONICMOE_DEVICE void tma_load(uint32_t destination, const CUtensorMap* map, uint32_t barrier,
                              int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

SONICMOE_DEVICE void tma_load(uint32_t destination, const CUtensorMap* map, uint32_t barrier,
                              int c0, int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// Stores the map's box from shared memory, clipped to the tensor, in this thread's open bulk group.
// What the generic proxy wrote needs fence_proxy_async_shared() first.
SONICMOE_DEVICE void tma_store(const CUtensorMap* map, uint32_t source, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
          map),
      "r"(source), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// tma_store() of data that leaves L2 before any other.
SONICMOE_DEVICE void tma_store_evict_first(const CUtensorMap* map, uint32_t source, int c0, int c1,
                                           int c2) {
  asm volatile(
      "{\n"
      ".reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group.L2::cache_hint "
      "[%0, {%2, %3, %4}], [%1], policy;\n"
      "}" ::"l"(map),
      "r"(source), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// Closes this thread's bulk group.
SONICMOE_DEVICE void bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until at most kPending of its groups still read shared memory, which may then be overwritten.
template <int kPending>
SONICMOE_DEVICE void bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

}  // namespace sonicmoe::ptx
