// C [M, N] = A [M, K] fp32 · B [K, N] bf16 on mma.sync. A is split into bf16 terms of 8 bits each,
// whose products with B are exact in float32: three terms are as accurate as float32 products, two
// (16 bits) serve a C that is rounded to bf16.
//   A element (m, k) at data[m * stride + k] (Unit::kDepth) or data[k * stride + m] (Unit::kWidth)
//   B element (k, n) at data[k * stride + n], rows starting at multiples of 16 bytes
// CTA tile 128 x 128, 8 warps of 32 x 64, 32 of K per step, two buffers: A goes through registers
// (where it is split), B by cp.async. Two or three times the work of a bf16 GEMM.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/router/simt_gemm.cuh"

namespace sonicmoe::cuda::router {

inline constexpr int kSplitTile = 128;
inline constexpr int kSplitDepth = 32;
inline constexpr int kSplitThreads = 256;

// A [rows, columns] tile of bf16 in shared memory; 16 bytes of padding put the 8 rows of an
// ldmatrix into different banks.
template <int kRows, int kColumns>
struct PaddedTile {
  static constexpr int rows = kRows;
  static constexpr int columns = kColumns;
  static constexpr int row_bytes = (kColumns + 8) * 2;
  static constexpr int bytes = kRows * row_bytes;
};
using SplitB = PaddedTile<kSplitDepth, kSplitTile>;
template <Unit kUnit>
struct SplitATile : PaddedTile<kSplitTile, kSplitDepth> {};
template <>
struct SplitATile<Unit::kWidth> : PaddedTile<kSplitDepth, kSplitTile> {};

template <Unit kUnit, int kTerms>
inline constexpr int kSplitStageBytes = kTerms * SplitATile<kUnit>::bytes + SplitB::bytes;
template <Unit kUnit, int kTerms>
inline constexpr int kSplitSharedBytes = 2 * kSplitStageBytes<kUnit, kTerms>;

// This thread's elements of the next tile of A: pairs along the unit stride.
struct SplitARegisters {
  static constexpr int kPairs = kSplitTile * kSplitDepth / 2 / kSplitThreads;
  float2 pairs[kPairs];
};

template <Unit kUnit>
__device__ void load_split_a(const SimtOperand<float, kUnit>& a, const SimtShape& shape,
                             std::int64_t first_m, std::int64_t k, std::int64_t k_end,
                             SplitARegisters& r) {
  using Tile = SplitATile<kUnit>;
  const bool by_depth = kUnit == Unit::kDepth;
  const std::int64_t first_row = by_depth ? first_m : k;
  const std::int64_t first_column = by_depth ? k : first_m;
  const std::int64_t row_end = by_depth ? shape.m : k_end;
  const std::int64_t column_end = by_depth ? k_end : shape.m;
#pragma unroll
  for (int j = 0; j < SplitARegisters::kPairs; ++j) {
    const int index = static_cast<int>(threadIdx.x) + j * kSplitThreads;
    const std::int64_t row = first_row + index / (Tile::columns / 2);
    const std::int64_t column = first_column + index % (Tile::columns / 2) * 2;
    const float* at = a.data + row * a.stride + column;
    r.pairs[j].x = row < row_end && column < column_end ? at[0] : 0.0f;
    r.pairs[j].y = row < row_end && column + 1 < column_end ? at[1] : 0.0f;
  }
}

// Splits the pairs and stores the terms, one tile after the other.
template <Unit kUnit, int kTerms>
__device__ void store_split_a(const SplitARegisters& r, unsigned char* tiles) {
  using Tile = SplitATile<kUnit>;
#pragma unroll
  for (int j = 0; j < SplitARegisters::kPairs; ++j) {
    const int index = static_cast<int>(threadIdx.x) + j * kSplitThreads;
    unsigned char* at =
        tiles + index / (Tile::columns / 2) * Tile::row_bytes + index % (Tile::columns / 2) * 4;
    float2 rest = r.pairs[j];
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
      const __nv_bfloat162 rounded = __floats2bfloat162_rn(rest.x, rest.y);
      *reinterpret_cast<__nv_bfloat162*>(at + term * Tile::bytes) = rounded;
      rest.x -= __low2float(rounded);  // exact
      rest.y -= __high2float(rounded);
    }
  }
}

// Starts the copies of B's rows [k, k + 32), columns [first_n, first_n + 128); zeros outside.
__device__ inline void load_split_b(const SimtOperand<__nv_bfloat16, Unit::kWidth>& b,
                                    const SimtShape& shape, std::int64_t first_n, std::int64_t k,
                                    std::int64_t k_end, uint32_t tile) {
#pragma unroll
  for (int j = 0; j < kSplitDepth * kSplitTile / 8 / kSplitThreads; ++j) {
    const int index = static_cast<int>(threadIdx.x) + j * kSplitThreads;
    const int row = index / (kSplitTile / 8);
    const int column = index % (kSplitTile / 8) * 8;
    const std::int64_t left = shape.n - first_n - column;
    const bool inside = k + row < k_end && left > 0;
    const __nv_bfloat16* source =
        inside ? b.data + (k + row) * b.stride + first_n + column : b.data;
    const uint32_t bytes = inside ? static_cast<uint32_t>(left < 8 ? left : 8) * 2 : 0;
    ptx::cp_async_16(tile + row * SplitB::row_bytes + column * 2, source, bytes);
  }
}

// The fragment of rows [m, m + 16), depths [k, k + 16) of a tile of A.
template <Unit kUnit>
__device__ void load_split_fragment(uint32_t (&fragment)[4], uint32_t tile, int m, int k,
                                    int lane) {
  constexpr int row_bytes = SplitATile<kUnit>::row_bytes;
  if constexpr (kUnit == Unit::kDepth) {
    ptx::load_matrix_x4(fragment, tile + (m + lane % 16) * row_bytes + (k + lane / 16 * 8) * 2);
  } else {
    ptx::load_matrix_x4_transposed(
        fragment, tile + (k + lane / 16 * 8 + lane % 8) * row_bytes + (m + lane / 8 % 2 * 8) * 2);
  }
}

// One step: 32 of K, all terms. `m` and `n`: where the warp's 32 x 64 results begin.
template <Unit kUnit, int kTerms>
__device__ void multiply_split(uint32_t a_tiles, uint32_t b_tile, int m, int n, int lane,
                               float (&sums)[2][8][4]) {
#pragma unroll
  for (int k = 0; k < kSplitDepth; k += 16) {
    uint32_t right[4][4];  // columns 16 j: (k, k + 8) of the first 8, then of the other 8
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      ptx::load_matrix_x4_transposed(
          right[j], b_tile + (k + lane / 8 % 2 * 8 + lane % 8) * SplitB::row_bytes +
                        (n + 16 * j + lane / 16 * 8) * 2);
    }
#pragma unroll
    for (int term = kTerms - 1; term >= 0; --term) {  // small terms first
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t left[4];
        load_split_fragment<kUnit>(left, a_tiles + term * SplitATile<kUnit>::bytes, m + 16 * i, k,
                                   lane);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          ptx::mma_m16n8k16_bf16(sums[i][2 * j], left, right[j][0], right[j][1]);
          ptx::mma_m16n8k16_bf16(sums[i][2 * j + 1], left, right[j][2], right[j][3]);
        }
      }
    }
  }
}

// Hands the CTA's tile to `store`: element by element, or (Store::kVectors) as 8 bf16 at a time,
// through shared memory, N a multiple of 8.
template <class Store>
__device__ void store_split_tile(const SimtShape& shape, const Store& store, std::int64_t first_m,
                                 std::int64_t first_n, int m, int n, int lane,
                                 const float (&sums)[2][8][4], unsigned char* shared) {
  using Tile = PaddedTile<kSplitTile, kSplitTile>;
  if constexpr (Store::kVectors) __syncthreads();  // the last step has read its buffer
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int v = 0; v < 4; v += 2) {
        const int row = m + 16 * i + lane / 4 + v / 2 * 8, column = n + 8 * j + lane % 4 * 2;
        if constexpr (Store::kVectors) {
          *reinterpret_cast<__nv_bfloat162*>(shared + row * Tile::row_bytes + column * 2) =
              __floats2bfloat162_rn(sums[i][j][v], sums[i][j][v + 1]);
        } else {
          for (int c = 0; c < 2; ++c) {
            if (first_m + row < shape.m && first_n + column + c < shape.n) {
              store(static_cast<int>(blockIdx.z), first_m + row, first_n + column + c,
                    sums[i][j][v + c]);
            }
          }
        }
      }
    }
  }
  if constexpr (Store::kVectors) {
    __syncthreads();
    for (int i = threadIdx.x; i < kSplitTile * kSplitTile / 8; i += kSplitThreads) {
      const int row = i / (kSplitTile / 8), column = i % (kSplitTile / 8) * 8;
      if (first_m + row >= shape.m || first_n + column >= shape.n) continue;
      store.vector(first_m + row, first_n + column,
                   *reinterpret_cast<const uint4*>(shared + row * Tile::row_bytes + column * 2));
    }
  }
}

/// As simt_gemm_kernel: grid (M tiles, N tiles, splits), store(split, m, n, value).
template <Unit kUnit, int kTerms, class Store>
__global__ void __launch_bounds__(kSplitThreads)
    split_gemm_kernel(SimtOperand<float, kUnit> a, SimtOperand<__nv_bfloat16, Unit::kWidth> b,
                      SimtShape shape, Store store) {
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr int kABytes = kTerms * SplitATile<kUnit>::bytes;
  constexpr int kStageBytes = kSplitStageBytes<kUnit, kTerms>;
  static_assert(!Store::kVectors ||
                PaddedTile<kSplitTile, kSplitTile>::bytes <= kSplitSharedBytes<kUnit, kTerms>);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int m = warp / 2 * 32;
  const int n = warp % 2 * 64;
  const std::int64_t first_m = std::int64_t{blockIdx.x} * kSplitTile;
  const std::int64_t first_n = std::int64_t{blockIdx.y} * kSplitTile;
  const std::int64_t k_begin = std::int64_t{blockIdx.z} * shape.k_per_split;
  const std::int64_t k_end = min(k_begin + shape.k_per_split, shape.k);
  float sums[2][8][4] = {};
  SplitARegisters registers;
  if (k_begin < k_end) {
    load_split_b(b, shape, first_n, k_begin, k_end, ptx::shared_address(shared) + kABytes);
    ptx::cp_async_commit_group();
    load_split_a(a, shape, first_m, k_begin, k_end, registers);
    store_split_a<kUnit, kTerms>(registers, shared);
  }
  int buffer = 0;
  for (std::int64_t k = k_begin; k < k_end; k += kSplitDepth, buffer ^= 1) {
    unsigned char* now = shared + buffer * kStageBytes;
    unsigned char* next = shared + (buffer ^ 1) * kStageBytes;
    ptx::cp_async_wait_group<0>();
    __syncthreads();  // this buffer is full for all, and all have left the other one
    const std::int64_t next_k = k + kSplitDepth;
    if (next_k < k_end) {
      load_split_b(b, shape, first_n, next_k, k_end, ptx::shared_address(next) + kABytes);
      ptx::cp_async_commit_group();
      load_split_a(a, shape, first_m, next_k, k_end, registers);
    }
    const uint32_t stage = ptx::shared_address(now);
    multiply_split<kUnit, kTerms>(stage, stage + kABytes, m, n, lane, sums);
    if (next_k < k_end) store_split_a<kUnit, kTerms>(registers, next);
  }
  store_split_tile(shape, store, first_m, first_n, m, n, lane, sums, shared);
}

}  // namespace sonicmoe::cuda::router
