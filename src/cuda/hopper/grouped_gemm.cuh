// Grouped GEMM for Hopper: for every expert e, D[e] = epilogue(A[e] · B[e]), bf16, fp32 sums.
// One persistent kernel template serves all six products of the layer; a Spec (specs.cuh) names it.
//
//   kRows   rows of an expert are the M side (up, down, dH, dX~): tiles of 128 rows x block_n
//           columns from the device's tile table; A is gathered by token or loaded by TMA
//   kDepth  rows of an expert are the reduction (dW1, dW2): A is 64 gathered rows x 128 of d,
//           B 64 rows x block_n of the sorted operand; the number of k-tiles varies by expert
//
// Roles       warps 0-3, 4-7 math (tile rows 0-63, 64-127)
//             warps 8-11 one to four loaders, the rest epilogue. Without epilogue warps the math
//             warps store what they computed, with an OwnEpilogue (store.cuh) a quarter of it
// Pipelines   full[s]: 1 expect_tx (+ 1 per gathering lane) · empty[s]: 1 per math warp
//             dump_full[w]: 4 warps of math warpgroup w · dump_empty[w]: 1 per epilogue warp (named
//             barrier 1 + w where there are none)
//             item_full[i]: 1, the first loader warp · item_empty[i]: 1 per other warp
// Schedule    tiles are handed out in order as CTAs become free (schedule.cuh)
// Timeline    load: [per k] rows' addresses → wait empty → TMA, cp.async → arrive
//             math: [per k] wait full → fence → 4 wgmma → release k-1, and k when k+1 is late;
//                   then round, dump, arrive (OwnEpilogue: store a quarter)
//             epilogue: [per half] wait dump_full → activation, stores → release
// Rows past a tile's end only spoil their own accumulator rows, which no epilogue stores. A
// warpgroup without rows ("dead") releases every stage and issues no wgmma: a tail of at most 64
// rows costs half a tile.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/hopper/tile/pipeline.cuh"
#include "cuda/hopper/tile/swizzle.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/setmaxnreg.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/tma.cuh"

namespace sonicmoe::cuda::hopper {

using bf16 = __nv_bfloat16;
using ptx::Major;
using tile::Role;
using tile::Slot;

enum class Grouping { kRows, kDepth };

// How accumulators leave the math warps: rounded to bf16 through the dump tile, as stored or
// transposed, or in float32 straight to global memory.
enum class Dump { kRows, kTransposed, kDirect };

struct GemmShape {
  Grouping grouping = Grouping::kRows;
  int block_n = 256;
  Major a = Major::kK;
  Major b = Major::kK;
  bool gather = true;  // A by cp.async, row by row
  Dump dump = Dump::kRows;
  int loader_warps = 1;  // of the helper warpgroup; the others are epilogue warps (kDirect: none)
  int extra_bytes = 0;   // shared memory of the epilogue warps' own, behind the dump tile

  __host__ __device__ constexpr int epilogue_warps() const {
    return dump == Dump::kDirect ? 0 : 4 - loader_warps;
  }
  // The dump tile leaves by TMA, which a math thread issues: stores of 16 bytes would compete with
  // the gather for the load-store unit.
  __host__ __device__ constexpr bool bulk_stores() const {
    return grouping == Grouping::kDepth && dump != Dump::kDirect;
  }
  // The first loader warp issues TMA; in kDepth that is all it does.
  __host__ __device__ constexpr int gather_warps() const {
    return !gather ? 0 : grouping == Grouping::kRows ? loader_warps : loader_warps - 1;
  }
  // Arrivals that fill a stage: expect_tx, and every gathering lane's copies.
  __host__ __device__ constexpr int full_arrivals() const { return 1 + 32 * gather_warps(); }
};

inline constexpr int kThreads = 384;
inline constexpr int kBlockM = 128;
inline constexpr int kBlockK = 64;
inline constexpr int kLoaderWarp = 8;
// 2 * math + helper = 504 = 3 * 168, exactly what 384 threads are launched with; a larger sum
// hangs.
inline constexpr int kMathRegisters = 184;
inline constexpr int kHelperRegisters = 136;
static_assert(2 * kMathRegisters + kHelperRegisters == 504);

inline constexpr int kSharedLimit = 232448;
inline constexpr int kBarrierBytes = 1024;

__host__ __device__ constexpr int stage_bytes(GemmShape s) {
  return (kBlockM + s.block_n) * kBlockK * 2;
}
__host__ __device__ constexpr int half_dump_bytes(GemmShape s) {
  return s.dump == Dump::kDirect ? 0 : 64 * s.block_n * 2;
}
__host__ __device__ constexpr int stage_count(GemmShape s) {
  const int rest = kSharedLimit - kBarrierBytes - 2 * half_dump_bytes(s) - s.extra_bytes;
  const int fit = rest / stage_bytes(s);
  return fit < 6 ? fit : 6;
}
__host__ __device__ constexpr int shared_bytes(GemmShape s) {
  return kBarrierBytes + stage_count(s) * stage_bytes(s) + 2 * half_dump_bytes(s) + s.extra_bytes;
}

// What loader and math need, whatever the epilogue.
struct OperandParams {
  CUtensorMap a;  // A by TMA: [P, depth], boxes of 64 rows x 64
  CUtensorMap b;  // kRows: weights; kDepth: [P, N]

  const bf16* gathered;           // X or dO [T, depth of d]
  uint32_t gathered_ld;           // elements, a multiple of 8
  const std::int32_t* row_token;  // [P] or null: row r is token r
  const bf16* b_rows;  // kDepth: B [P, N] itself, for experts of fewer rows than a k-tile
  int64_t b_rows_ld;

  // kRows: the tile table, {first row, rows from there to the expert's end, expert, tile of the
  // expert}; null: the tiles of one group of num_rows rows, max_entries of them. kDepth: the expert
  // list, {first row, rows, expert, 0}.
  const int4* entries;
  int num_rows;
  const std::int32_t* num_entries;  // on the device, or null: max_entries
  int max_entries;
  // MN-major B: a box of b is the whole tile, in blocks of 64 columns; else each block is a box,
  // and each instruction takes the loader some 100 clocks.
  bool whole_boxes;
  bool early_release;     // hand a stage back before the next has come (math.cuh)
  std::uint32_t* claims;  // tile counters (schedule.cuh), or null: strided
  int m_tiles;            // kDepth: ceil(d / 128); else 1
  int n_tiles;
  int n_group;       // column tiles that all rows pass before the next ones; 0: n_tiles
  int row_block;     // tile rows of an expert that pass its columns together (tile_order.hpp)
  int depth;         // kRows: length of the reduction; kDepth: d, the columns of the gathered side
  int b_columns;     // kDepth: N, columns of b_rows
  int first_column;  // kRows: first column of B's outer side (slabs of d)
  // Columns of a tile come in two halves, gate and up: [0, block_n / 2) from part 0, the rest from
  // part 1 of the same columns.
  bool paired;
};

template <class Spec>
struct Params {
  OperandParams operands;
  typename Spec::Epilogue::Params epilogue;
};

struct SharedLayout {
  uint32_t full, empty, dump_full, dump_empty, item_full, item_empty, items, ring, dump;
  uint32_t extra, extra_barriers;  // GemmShape::extra_bytes; 640 bytes for barriers
};

template <class Spec>
__device__ SharedLayout shared_layout(uint32_t base) {
  constexpr GemmShape s = Spec::shape;
  SharedLayout l;
  l.full = base;
  l.empty = base + 64;
  l.dump_full = base + 128;
  l.dump_empty = base + 144;
  l.item_full = base + 192;
  l.item_empty = base + 256;
  l.items = base + 320;
  l.extra_barriers = base + 384;
  l.ring = base + kBarrierBytes;
  l.dump = l.ring + stage_count(s) * stage_bytes(s);
  l.extra = l.dump + 2 * half_dump_bytes(s);
  return l;
}

__device__ inline uint32_t a_of_stage(const SharedLayout& l, GemmShape s, uint32_t stage) {
  return l.ring + stage * stage_bytes(s);
}
__device__ inline uint32_t b_of_stage(const SharedLayout& l, GemmShape s, uint32_t stage) {
  return a_of_stage(l, s, stage) + kBlockM * kBlockK * 2;
}

// One tile of the product.
struct Item {
  int row0, rows, expert;  // of the table entry
  int m;                   // kDepth: tile along d
  int n;                   // tile along the columns
  int k_tiles;
};

}  // namespace sonicmoe::cuda::hopper

#include "cuda/hopper/mainloop/schedule.cuh"
// The roles.
#include "cuda/hopper/mainloop/loader.cuh"
#include "cuda/hopper/mainloop/math.cuh"

namespace sonicmoe::cuda::hopper {

template <class Spec>
__device__ void epilogue_role(const Params<Spec>& p, const SharedLayout& l, int warp, int lane) {
  uint32_t parity = 0;
  ItemSink<Spec> items(p.operands, l, lane, Role::kEpilogue);
  typename Spec::Epilogue::State state(p.epilogue, l, warp, lane);
  Item t{}, following{};
  bool more = items.next(t);
  if (more) state.begin(t, 0);
  while (more) {
    for (int w = 0; w < 2; ++w) {
      // Announces the half after this one, so that its loads run while this one is stored. The
      // following item is there by now: the loader passes it on once it has issued the last k-tile
      // of t, and half 0 of t has left the math warps.
      if (w == 0) {
        state.begin(t, 1);
      } else {
        more = items.next(following);
        if (more) state.begin(following, 0);
      }
      typename Spec::Epilogue epilogue(p.epilogue, t, w, warp, lane, state);
      tile::wait(l.dump_full + 8 * w, parity, Role::kEpilogue, Slot::kDumpFull, w);
      epilogue.store(l.dump + w * half_dump_bytes(Spec::shape));
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(l.dump_empty + 8 * w);
    }
    parity ^= 1;
    t = following;
  }
}

template <class Spec>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_gemm_kernel(const __grid_constant__ Params<Spec> p) {
  constexpr GemmShape shape = Spec::shape;
  extern __shared__ __align__(1024) uint8_t shared[];
  const SharedLayout l = shared_layout<Spec>(ptx::shared_address(shared));
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  tile::poison_shared(shared, shared_bytes(shape));
  if (threadIdx.x == 0) {
    for (int s = 0; s < stage_count(shape); ++s) {
      ptx::mbarrier_init(l.full + 8 * s, shape.full_arrivals());
      ptx::mbarrier_init(l.empty + 8 * s, 8);
    }
    for (int i = 0; i < kItemSlots; ++i) {
      ptx::mbarrier_init(l.item_full + 8 * i, 1);
      ptx::mbarrier_init(l.item_empty + 8 * i, item_readers(shape));
    }
    for (int w = 0; w < 2 && shape.epilogue_warps() > 0; ++w) {
      ptx::mbarrier_init(l.dump_full + 8 * w, 4);
      ptx::mbarrier_init(l.dump_empty + 8 * w, shape.epilogue_warps());
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (warp < kLoaderWarp) {
    ptx::setmaxnreg_increase<kMathRegisters>();
    math_role<Spec>(p, l, warp, lane);
  } else {
    ptx::setmaxnreg_decrease<kHelperRegisters>();
    if (warp < kLoaderWarp + shape.loader_warps) {
      load_role<Spec>(p.operands, l, warp - kLoaderWarp, lane);
    } else if constexpr (shape.epilogue_warps() > 0) {
      epilogue_role<Spec>(p, l, warp - kLoaderWarp - shape.loader_warps, lane);
    }
  }
}

}  // namespace sonicmoe::cuda::hopper
