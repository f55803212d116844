// C [M, N] = A [M, K] B [K, N] in float32 on the ordinary cores, for operands that the tensor cores
// would round: float32 ones, and any stride. 64x64 tiles, 4x4 results per thread.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace sonicmoe::cuda::router {

/// Element (i, k) of an operand lies at data[i * stride + k] (kDepth) or data[k * stride + i]
/// (kWidth): which of its two dimensions has unit stride.
enum class Unit : bool { kDepth, kWidth };

template <class T, Unit kUnit>
struct SimtOperand {
  using Element = T;
  static constexpr Unit unit = kUnit;
  const T* data;
  std::int64_t stride;
};

struct SimtShape {
  std::int64_t m, n, k;
  std::int64_t k_per_split;  // split z sums the k in [z, z + 1) * k_per_split
};

inline constexpr int kSimtTile = 64;
inline constexpr int kSimtDepth = 16;
inline constexpr int kSimtThreads = 256;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

using SimtTile = float[kSimtDepth][kSimtTile + 4];  // rows stay 16-byte aligned

// Fills a tile with elements [first, first + 64) x [k, k + 16), zeros outside of the operand.
template <class Operand>
__device__ void load_simt_tile(const Operand& operand, std::int64_t first, std::int64_t width,
                               std::int64_t k, std::int64_t k_end, SimtTile& tile) {
#pragma unroll
  for (int j = 0; j < kSimtTile * kSimtDepth / kSimtThreads; ++j) {
    const int index = static_cast<int>(threadIdx.x) + j * kSimtThreads;
    const bool by_depth = Operand::unit == Unit::kDepth;
    const int kk = by_depth ? index % kSimtDepth : index / kSimtTile;
    const int i = by_depth ? index / kSimtDepth : index % kSimtTile;
    float value = 0.0f;
    if (first + i < width && k + kk < k_end) {
      value = to_float(by_depth ? operand.data[(first + i) * operand.stride + k + kk]
                                : operand.data[(k + kk) * operand.stride + first + i]);
    }
    tile[kk][i] = value;
  }
}

/// Calls store(split, m, n, value) for every element of C. Grid (M tiles, N tiles, splits); every
/// element is summed by one thread in ascending k.
template <class A, class B, class Store>
__global__ void __launch_bounds__(kSimtThreads)
    simt_gemm_kernel(A a, B b, SimtShape shape, Store store) {
  __shared__ __align__(16) SimtTile a_tile;
  __shared__ __align__(16) SimtTile b_tile;
  const std::int64_t first_m = std::int64_t{blockIdx.x} * kSimtTile;
  const std::int64_t first_n = std::int64_t{blockIdx.y} * kSimtTile;
  const std::int64_t k_begin = std::int64_t{blockIdx.z} * shape.k_per_split;
  const std::int64_t k_end = min(k_begin + shape.k_per_split, shape.k);
  const int row = static_cast<int>(threadIdx.x) / 16 * 4;
  const int column = static_cast<int>(threadIdx.x) % 16 * 4;
  float sum[4][4] = {};
  for (std::int64_t k = k_begin; k < k_end; k += kSimtDepth) {
    load_simt_tile(a, first_m, shape.m, k, k_end, a_tile);
    load_simt_tile(b, first_n, shape.n, k, k_end, b_tile);
    __syncthreads();
#pragma unroll
    for (int kk = 0; kk < kSimtDepth; ++kk) {
      const float4 left = *reinterpret_cast<const float4*>(&a_tile[kk][row]);
      const float4 right = *reinterpret_cast<const float4*>(&b_tile[kk][column]);
      const float l[4] = {left.x, left.y, left.z, left.w};
      const float r[4] = {right.x, right.y, right.z, right.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(l[i], r[j], sum[i][j]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const std::int64_t m = first_m + row + i;
      const std::int64_t n = first_n + column + j;
      if (m < shape.m && n < shape.n) store(static_cast<int>(blockIdx.z), m, n, sum[i][j]);
    }
  }
}

}  // namespace sonicmoe::cuda::router
