// Layouts of operand and dump tiles in shared memory: 128-byte rows, eight of them an atom of 1024
// bytes, in which the 16-byte chunk index is XORed with the row (the hardware's 128-byte swizzle).
// Tiles start at multiples of 1024 bytes.
#pragma once

#include <cstdint>

#include "cuda/ptx/common.cuh"
#include "cuda/ptx/major.hpp"

namespace sonicmoe::tile {

using ptx::Major;

inline constexpr int kSwizzleAtomBytes = 1024;  // 8 rows of 128 bytes
inline constexpr int kSwizzleRowElements = 64;  // bf16 values in 128 bytes
inline constexpr int kBlockBytes = 8192;        // 64 rows of 128 bytes

// Byte offset of 16-byte chunk `chunk` (0..7) of row `row`.
__host__ __device__ constexpr uint32_t chunk_offset(uint32_t row, uint32_t chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// Byte offset of chunk `chunk` (8 columns) of row `row` of a dump tile of 64 rows: blocks of 64
// columns. stmatrix writes of 8 rows and 16-byte reads of 8 chunks are both free of bank conflicts.
__host__ __device__ constexpr uint32_t dump_offset(uint32_t row, uint32_t chunk) {
  return (chunk / 8) * kBlockBytes + chunk_offset(row, chunk % 8);
}

// Bytes from one k16 step of an operand tile to the next.
__host__ __device__ constexpr uint32_t k16_bytes(Major major) {
  return major == Major::kK ? 32 : 16 * 128;
}

// wgmma matrix descriptor of the tile at `address`, k16 step 0. Fields in units of 16 bytes: start
// address, leading offset (MN-major: next 64 mn; K-major: unused), stride offset (next 8 rows).
__device__ __forceinline__ uint64_t make_descriptor(uint32_t address, Major major) {
  const uint64_t leading = major == Major::kK ? 1 : kBlockBytes / 16;
  const uint64_t stride = kSwizzleAtomBytes / 16;
  const uint64_t swizzle_128b = 1;
  return ((address & 0x3ffff) >> 4) | leading << 16 | stride << 32 | swizzle_128b << 62;
}

// The descriptor `bytes` further on. Valid while the address stays inside the 256 KB window, which
// any shared address does.
__device__ __forceinline__ uint64_t advance_descriptor(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

}  // namespace sonicmoe::tile
