// The dense batched product behind M3 and M4:  D[e] = A[e] · B[e]ᵀ, bf16, fp32 accumulation.
//   A  [Ea, M, K] (K-major) or [Ea, K, M] (MN-major), expert e reads matrix e mod Ea
//   B  [E, N, K] (K-major) or [E, K, N] (MN-major)          D  [E, M, N]
// Persistent CTAs of 384 threads, 128 x block_n x 64 tiles, alone or in pairs that share B.
// Roles       warps 0-3, 4-7 math (rows 0-63, 64-127) · warp 8 loader · warps 9-11 epilogue
// Pipelines   full = 1 expect_tx per pass; empty = 1 per math warp of every CTA in the cluster
//             dump_full[w] = 4 warps of math warpgroup w; dump_empty[w] = 1 per epilogue warp
// Timeline    load: [per k] wait empty → TMA     math: [per k] wait full → 4 wgmma → release k-1;
//             then dump     epilogue: wait dump_full, background work meanwhile → store → release
#pragma once

#include "background.cuh"
#include "cuda/hopper/tile/swizzle.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/setmaxnreg.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "harness.cuh"

namespace experiment {

namespace ptx = sonicmoe::ptx;
namespace tile = sonicmoe::tile;
using ptx::Major;
using tile::Role;
using tile::Slot;

// What happens to the accumulators: nothing (the mainloop alone), a dump to shared memory that
// nobody reads, or the dump and its way to D (a whole GEMM): 16-byte loads and stores by three
// epilogue warps, one bulk copy per row, or one tensor store per 64 columns; the last two by one
// warp per half.
enum class Output { kNone, kDump, kStore, kBulkRows, kTensorStore };

struct MainloopShape {
  int block_n = 256;
  int stages = 3;
  int cluster = 1;
  Major a = Major::kK;
  Major b = Major::kK;
  Output output = Output::kNone;
  int background_warps = 0;  // how many of the three epilogue warps also aggregate
  int background_loads = 8;  // 16-byte loads in flight per lane
  BackgroundWork background_work = BackgroundWork::kSum;
};

// 2 * math + helper = 504 = 3 * 168, exactly what 384 threads are launched with.
inline constexpr int kMathRegisters = 192;
inline constexpr int kHelperRegisters = 120;

enum class NamedBarrier : int { kSkew = 1 };

template <MainloopShape kShape>
struct MainloopSpec {
  static constexpr MainloopShape shape = kShape;
  static constexpr int threads = 384;
  static constexpr int epilogue_warps = 3;
  static constexpr bool stores = kShape.output >= Output::kStore;
  static constexpr int a_bytes = 128 * 128;
  static constexpr int b_bytes = kShape.block_n * 128;
  static constexpr int stage_bytes = a_bytes + b_bytes;
  // Rows of a bulk-row dump are 16 bytes apart beyond their length: stmatrix then has no conflicts
  // without a swizzle, which a bulk copy would not undo.
  static constexpr int row_pitch = kShape.block_n * 2 + 16;
  static constexpr int half_bytes = kShape.output == Output::kNone       ? 0
                                    : kShape.output == Output::kBulkRows ? 64 * row_pitch
                                                                         : 128 * kShape.block_n;
  static constexpr int dump_readers = kShape.output == Output::kStore ? epilogue_warps : 1;
  static constexpr int shared_bytes = 1024 + kShape.stages * stage_bytes + 2 * half_bytes;
  static_assert(shared_bytes <= 232448);
};

struct MainloopParams {
  CUtensorMap a, b, d_map;
  bf16* d;           // [E, M, N]
  uint64_t* cycles;  // [blocks]
  int experts, a_experts, m_tiles, n_tiles, k_tiles, n;
  bool store_direct;  // Output::kNone only: store from the math warps
  bool skew;          // start math warpgroup 1 one k-tile after warpgroup 0
  BackgroundParams background;
};

// Work item `index` of a cluster: m pairs fastest, then n tiles, then experts.
struct Item {
  int expert, m, n;
};
template <class S>
__device__ Item item_at(const MainloopParams& p, int index, uint32_t rank) {
  const int m_items = p.m_tiles / S::shape.cluster;
  const int rest = index / m_items;
  return {rest / p.n_tiles, (index % m_items) * S::shape.cluster + static_cast<int>(rank),
          rest % p.n_tiles};
}

struct SharedLayout {
  uint32_t full, empty, dump_full, dump_empty, math_done, ring, dump;
};
template <class S>
__device__ SharedLayout shared_layout(uint32_t base) {
  SharedLayout l;
  l.full = base;
  l.empty = base + 64;
  l.dump_full = base + 128;
  l.dump_empty = base + 144;
  l.math_done = base + 160;
  l.ring = base + 1024;
  l.dump = l.ring + S::shape.stages * S::stage_bytes;
  return l;
}

template <class S>
__device__ void load_role(const MainloopParams& p, const SharedLayout& l, uint32_t rank, int first,
                          int step, int items) {
  constexpr MainloopShape shape = S::shape;
  constexpr bool pair = shape.cluster == 2;
  tile::RingState<shape.stages> state;
  for (int index = first; index < items; index += step) {
    const Item t = item_at<S>(p, index, rank);
    const int a_expert = t.expert % p.a_experts;
    for (int k = 0; k < p.k_tiles; ++k) {
      tile::wait<pair>(l.empty + 8 * state.stage, state.parity ^ 1, Role::kLoader, Slot::kEmpty,
                       state.stage);
      const uint32_t bar = l.full + 8 * state.stage;
      const uint32_t a = l.ring + state.stage * S::stage_bytes, b = a + S::a_bytes;
      ptx::mbarrier_arrive_expect_tx(bar, S::stage_bytes);
      if constexpr (shape.a == Major::kK) {
        ptx::tma_load(a, &p.a, bar, k * 64, t.m * 128, a_expert);
      } else {
        ptx::tma_load(a, &p.a, bar, t.m * 128, k * 64, a_expert);
        ptx::tma_load(a + tile::kBlockBytes, &p.a, bar, t.m * 128 + 64, k * 64, a_expert);
      }
      if constexpr (shape.b == Major::kK && !pair) {
        ptx::tma_load(b, &p.b, bar, k * 64, t.n * shape.block_n, t.expert);
      } else if constexpr (shape.b == Major::kK) {
        const int half = shape.block_n / 2;
        ptx::tma_load_multicast(b + rank * half * 128, &p.b, bar, 0b11, k * 64,
                                t.n * shape.block_n + rank * half, t.expert);
      } else {
        for (int box = pair ? rank : 0; box < shape.block_n / 64; box += shape.cluster) {
          const uint32_t to = b + box * tile::kBlockBytes;
          const int column = t.n * shape.block_n + box * 64;
          if constexpr (pair) {
            ptx::tma_load_multicast(to, &p.b, bar, 0b11, column, k * 64, t.expert);
          } else {
            ptx::tma_load(to, &p.b, bar, column, k * 64, t.expert);
          }
        }
      }
      state.advance();
    }
  }
}

template <class S>
__device__ void release_stage(const SharedLayout& l, uint32_t stage, int lane) {
  if constexpr (S::shape.cluster == 1) {
    if (lane == 0) ptx::mbarrier_arrive(l.empty + 8 * stage);
  } else {
    if (lane < 2) ptx::mbarrier_arrive_cluster_relaxed(l.empty + 8 * stage, lane);
  }
}

// Rounds warpgroup w's 64 x block_n product to bf16 and writes it to its half of the dump.
template <class S, int kCount>
__device__ void dump_accumulators(const float (&acc)[kCount], uint32_t half, int warp, int lane) {
  const int row = (warp & 3) * 16 + (lane & 15);
#pragma unroll
  for (int j = 0; j < kCount / 8; ++j) {  // 16 columns each
    const int chunk = 2 * j + (lane >> 4);
    const uint32_t offset = S::shape.output == Output::kBulkRows ? row * S::row_pitch + chunk * 16
                                                                 : tile::dump_offset(row, chunk);
    ptx::stmatrix_x4(half + offset, ptx::pack_bf16x2(acc[8 * j], acc[8 * j + 1]),
                     ptx::pack_bf16x2(acc[8 * j + 2], acc[8 * j + 3]),
                     ptx::pack_bf16x2(acc[8 * j + 4], acc[8 * j + 5]),
                     ptx::pack_bf16x2(acc[8 * j + 6], acc[8 * j + 7]));
  }
}

// The mainloop alone must still have a use of its accumulators that the compiler cannot rule out:
// ptxas drops every wgmma of a dead product, volatile or not. Slow; for checks only.
template <class S, int kCount>
__device__ void store_accumulators(const MainloopParams& p, const Item& t,
                                   const float (&acc)[kCount], int warp, int lane) {
  const int64_t row = (int64_t{t.expert} * p.m_tiles + t.m) * 128 + warp * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int column = t.n * S::shape.block_n + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (column < p.n) p.d[(row + i / 2 % 2 * 8) * p.n + column] = __float2bfloat16(acc[i]);
  }
}

template <class S>
__device__ void math_role(const MainloopParams& p, const SharedLayout& l, uint32_t rank, int warp,
                          int lane, int first, int step, int items) {
  constexpr MainloopShape shape = S::shape;
  const int w = warp / 4;
  const uint32_t a_half = shape.a == Major::kK ? 64 * 128 : tile::kBlockBytes;
  const uint64_t a0 = tile::make_descriptor(l.ring + w * a_half, shape.a);
  const uint64_t b0 = tile::make_descriptor(l.ring + S::a_bytes, shape.b);
  tile::RingState<shape.stages> state;
  uint32_t dump_parity = 1;
  bool signal_skew = p.skew && w == 0 && first < items;
  if (p.skew && w == 1 && first < items) {
    ptx::named_barrier_sync(static_cast<int>(NamedBarrier::kSkew), 256);
  }
  float acc[shape.block_n / 2];
  for (int index = first; index < items; index += step) {
    uint32_t previous = 0;
    for (int k = 0; k < p.k_tiles; ++k) {
      tile::wait(l.full + 8 * state.stage, state.parity, Role::kMath, Slot::kFull, state.stage);
      const uint64_t a = tile::advance_descriptor(a0, state.stage * S::stage_bytes);
      const uint64_t b = tile::advance_descriptor(b0, state.stage * S::stage_bytes);
      ptx::fence_accumulators(acc);
      ptx::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < 4; ++kk) {
        ptx::Wgmma<shape.block_n, shape.a, shape.b>::mma(
            acc, tile::advance_descriptor(a, kk * tile::k16_bytes(shape.a)),
            tile::advance_descriptor(b, kk * tile::k16_bytes(shape.b)), (k | kk) != 0);
      }
      ptx::wgmma_commit_group();
      ptx::fence_accumulators(acc);
      if (signal_skew) {
        ptx::named_barrier_arrive(static_cast<int>(NamedBarrier::kSkew), 256);
        signal_skew = false;
      }
      ptx::wgmma_wait_group<1>();
      if (k > 0) release_stage<S>(l, previous, lane);
      previous = state.stage;
      state.advance();
    }
    ptx::wgmma_wait_group<0>();
    ptx::fence_accumulators(acc);
    release_stage<S>(l, previous, lane);
    if constexpr (shape.output == Output::kNone) {
      if (p.store_direct) store_accumulators<S>(p, item_at<S>(p, index, rank), acc, warp, lane);
    } else {
      if constexpr (S::stores) {
        tile::wait(l.dump_empty + 8 * w, dump_parity, Role::kMath, Slot::kDumpEmpty, w);
        dump_parity ^= 1;
      }
      dump_accumulators<S>(acc, l.dump + w * S::half_bytes, warp, lane);
      if constexpr (shape.output > Output::kStore) ptx::fence_proxy_async_shared();
      __syncwarp();
      if (S::stores && lane == 0) ptx::mbarrier_arrive(l.dump_full + 8 * w);
    }
  }
  if (lane == 0) ptx::mbarrier_arrive(l.math_done);
}

// Waits for `barrier`, with background units in the gaps.
template <class S>
__device__ void wait_with_background(const MainloopParams& p, uint32_t barrier, uint32_t parity,
                                     int epilogue_warp, int lane, uint32_t slot) {
  if constexpr (S::shape.background_warps > 0) {
    if (epilogue_warp < S::shape.background_warps) {
      while (!ptx::mbarrier_test_wait(barrier, parity)) {
        if (!run_background_unit<S::shape.background_loads, S::shape.background_work>(p.background,
                                                                                      lane))
          break;
      }
    }
  }
  tile::wait(barrier, parity, Role::kEpilogue, Slot::kDumpFull, slot);
}

// The epilogue of half w of every tile, by one warp, without touching the values.
template <class S>
__device__ void bulk_store_half(const MainloopParams& p, const SharedLayout& l, uint32_t rank,
                                int w, int lane, int first, int step, int items) {
  constexpr MainloopShape shape = S::shape;
  const uint32_t half = l.dump + w * S::half_bytes;
  uint32_t parity = 0;
  for (int index = first; index < items; index += step) {
    const Item t = item_at<S>(p, index, rank);
    wait_with_background<S>(p, l.dump_full + 8 * w, parity, w, lane, w);
    parity ^= 1;
    if constexpr (shape.output == Output::kBulkRows) {
      const int64_t row0 = (int64_t{t.expert} * p.m_tiles + t.m) * 128 + w * 64;
      const int column = t.n * shape.block_n;
      const int bytes = min(shape.block_n, p.n - column) * 2;
#pragma unroll
      for (int row = lane; row < 64; row += 32) {
        ptx::bulk_store(p.d + (row0 + row) * p.n + column, half + row * S::row_pitch, bytes);
      }
    } else if (ptx::elect_one()) {
#pragma unroll
      for (int block = 0; block < shape.block_n / 64; ++block) {
        ptx::tma_store(&p.d_map, half + block * tile::kBlockBytes, t.n * shape.block_n + block * 64,
                       t.m * 128 + w * 64, t.expert);
      }
    }
    ptx::bulk_commit_group();
    ptx::bulk_wait_group_read<0>();
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(l.dump_empty + 8 * w);
  }
  ptx::bulk_wait_group<0>();
}

template <class S>
__device__ void epilogue_role(const MainloopParams& p, const SharedLayout& l, uint32_t rank,
                              int epilogue_warp, int lane, int first, int step, int items) {
  constexpr MainloopShape shape = S::shape;
  if constexpr (shape.output == Output::kStore) {
    uint32_t parity = 0;
    for (int index = first; index < items; index += step) {
      const Item t = item_at<S>(p, index, rank);
      for (int w = 0; w < 2; ++w) {
        wait_with_background<S>(p, l.dump_full + 8 * w, parity, epilogue_warp, lane, w);
        const int64_t row0 = (int64_t{t.expert} * p.m_tiles + t.m) * 128 + w * 64;
        const uint32_t half = l.dump + w * S::half_bytes;
        for (int g = epilogue_warp; g < 16; g += S::epilogue_warps) {
          const int row = g * 4 + lane / 8;
          bf16* out = p.d + (row0 + row) * p.n;
#pragma unroll
          for (int block = 0; block < shape.block_n / 64; ++block) {
            const int column = t.n * shape.block_n + block * 64 + (lane & 7) * 8;
            const uint4 v =
                ptx::load_shared_v4(half + tile::dump_offset(row, block * 8 + (lane & 7)));
            if (column < p.n) ptx::store_global_v4(out + column, v);
          }
        }
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(l.dump_empty + 8 * w);
      }
      parity ^= 1;
    }
  }
  if constexpr (shape.output > Output::kStore) {
    if (epilogue_warp < 2) bulk_store_half<S>(p, l, rank, epilogue_warp, lane, first, step, items);
  }
  if constexpr (shape.background_warps > 0) {
    // Whole background work if asked to finish it, else until the math is over.
    if (epilogue_warp < shape.background_warps) {
      while (p.background.complete || !ptx::mbarrier_test_wait(l.math_done, 0)) {
        if (!run_background_unit<shape.background_loads, shape.background_work>(p.background, lane))
          break;
      }
    }
  }
}

template <class S>
__global__ void __launch_bounds__(S::threads, 1)
    mainloop_kernel(const __grid_constant__ MainloopParams p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const SharedLayout l = shared_layout<S>(ptx::shared_address(shared));
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const uint32_t rank = S::shape.cluster == 1 ? 0 : ptx::cluster_rank();
  if (threadIdx.x == 0) {
    if ((ptx::shared_address(shared) & 1023) != 0) __trap();
    for (int s = 0; s < S::shape.stages; ++s) {
      ptx::mbarrier_init(l.full + 8 * s, 1);
      ptx::mbarrier_init(l.empty + 8 * s, 8 * S::shape.cluster);
    }
    for (int w = 0; w < 2; ++w) {
      ptx::mbarrier_init(l.dump_full + 8 * w, 4);
      ptx::mbarrier_init(l.dump_empty + 8 * w, S::dump_readers);
    }
    ptx::mbarrier_init(l.math_done, 8);
    ptx::fence_mbarrier_init();
  }
  if constexpr (S::shape.cluster == 1) {
    __syncthreads();
  } else {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  const uint64_t start = clock64();
  const int first = blockIdx.x / S::shape.cluster, step = gridDim.x / S::shape.cluster;
  const int items = p.experts * (p.m_tiles / S::shape.cluster) * p.n_tiles;
  if (warp >= 8) {
    ptx::setmaxnreg_decrease<kHelperRegisters>();
    if (warp == 8) {
      if (lane == 0) load_role<S>(p, l, rank, first, step, items);
      __syncwarp();
    } else {
      epilogue_role<S>(p, l, rank, warp - 9, lane, first, step, items);
    }
  } else {
    ptx::setmaxnreg_increase<kMathRegisters>();
    math_role<S>(p, l, rank, warp, lane, first, step, items);
    if (threadIdx.x == 0) p.cycles[blockIdx.x] = clock64() - start;
  }
  if constexpr (S::shape.cluster == 2) {  // the peer may still multicast or arrive here
    __syncwarp();
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

}  // namespace experiment
