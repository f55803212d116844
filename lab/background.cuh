// The aggregation as background work:  O[t] = Σ_k s[t, k] · Y[pos[t, k]],  in units of one token
// and kUnitColumns columns that a warp takes from a global counter whenever it would otherwise
// wait.
#pragma once

#include "cuda/ptx/math.cuh"
#include "cuda/ptx/memory.cuh"
#include "harness.cuh"

namespace experiment {

inline constexpr int kUnitColumns = 1024;

// The whole sum, or, to place its cost, the loads with as little arithmetic as keeps them (one xor
// per word), or the arithmetic without the loads. Only kSum gives a right O.
enum class BackgroundWork { kSum, kLoadsOnly, kMathOnly };

struct BackgroundParams {
  const bf16* y;   // [T*K, d]
  const int* pos;  // [T, K] rows of Y
  const float* s;  // [T, K]
  bf16* o;         // [T, d]
  int* counter;    // next unit; zeroed before the launch
  int tokens, top_k, d;
  int units;      // how many to hand out at most; beyond T*d/kUnitColumns they start over
  bool complete;  // finish all units, even after the math has ended
};

// One unit, by one warp; top_k must be a multiple of kLoads. Returns false when none is left.
template <int kLoads, BackgroundWork kWork = BackgroundWork::kSum>
__device__ __forceinline__ bool run_background_unit(const BackgroundParams& p, int lane) {
  namespace ptx = sonicmoe::ptx;
  int unit = 0;
  if (lane == 0) unit = atomicAdd(p.counter, 1);
  unit = __shfl_sync(~0u, unit, 0);
  if (unit >= p.units) return false;
  const int per_token = (p.d + kUnitColumns - 1) / kUnitColumns;
  const int token = unit / per_token % p.tokens;
  const int begin = unit % per_token * kUnitColumns;
  const int end = min(begin + kUnitColumns, p.d);
  // Lane k holds token row k's offset in Y, in 16-byte chunks, and its weight.
  uint32_t row = 0;
  float weight = 0;
  if (lane < p.top_k) {
    row = static_cast<uint32_t>(int64_t{__ldg(p.pos + int64_t{token} * p.top_k + lane)} * p.d / 8);
    weight = __ldg(p.s + int64_t{token} * p.top_k + lane);
  }
  for (int c = begin + lane * 8; c < end; c += 256) {
    const uint4* column = reinterpret_cast<const uint4*>(p.y + c);
    float sum[8] = {};
    for (int k0 = 0; k0 < p.top_k; k0 += kLoads) {
      uint32_t offset[kLoads];
      uint4 v[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) offset[i] = __shfl_sync(~0u, row, k0 + i);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if constexpr (kWork == BackgroundWork::kMathOnly) {
          v[i] = {offset[i], offset[i] + c, offset[i] ^ c, offset[i] - c};
        } else {
          v[i] = ptx::load_global_nc_v4(column + offset[i]);
        }
      }
      if constexpr (kWork == BackgroundWork::kLoadsOnly) {
        uint4 all = {};
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          all.x ^= v[i].x;
          all.y ^= v[i].y;
          all.z ^= v[i].z;
          all.w ^= v[i].w;
        }
        sum[0] += __uint_as_float(all.x ^ all.y ^ all.z ^ all.w);
      } else {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const float scale = __shfl_sync(~0u, weight, k0 + i);
          const uint32_t words[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            sum[2 * j] = fmaf(scale, ptx::unpack_low(words[j]), sum[2 * j]);
            sum[2 * j + 1] = fmaf(scale, ptx::unpack_high(words[j]), sum[2 * j + 1]);
          }
        }
      }
    }
    const uint4 packed = {ptx::pack_bf16x2(sum[0], sum[1]), ptx::pack_bf16x2(sum[2], sum[3]),
                          ptx::pack_bf16x2(sum[4], sum[5]), ptx::pack_bf16x2(sum[6], sum[7])};
    ptx::store_global_streaming_v4(p.o + int64_t{token} * p.d + c, packed);
  }
  return true;
}

}  // namespace experiment
