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
//             warps store what they computed, with a MathWarpEpilogue (epilogue/store.cuh) a
//             quarter of it
// Pipelines   full[s], empty[s]: the ring of stages · dump_full[w], dump_empty[w]: the halves of
// the
//             dump tile (a named barrier where no epilogue warp waits) · item_full[i],
//             item_empty[i]: the tiles to come. Who arrives how often: arrivals() in shape.hpp
// Schedule    tiles are handed out in order as CTAs become free (mainloop/schedule.cuh)
// Timeline    load: [per k] rows' addresses → wait empty → TMA, cp.async → arrive
//             math: [per k] wait full → fence → 4 wgmma → release k-1, and k when k+1 is late;
//                   then round, dump, arrive (MathWarpEpilogue: store a quarter)
//             epilogue: [per half] wait dump_full → activation, stores → release
// Rows past a tile's end only spoil their own accumulator rows, which no epilogue stores. A
// warpgroup without rows ("dead") releases every stage and issues no wgmma: a tail of at most 64
// rows costs half a tile.
#pragma once

#include "cuda/hopper/mainloop/loader.cuh"
#include "cuda/hopper/mainloop/math.cuh"
#include "cuda/hopper/mainloop/schedule.cuh"
#include "cuda/hopper/shape.hpp"
#include "cuda/hopper/tile/pipeline.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/setmaxnreg.cuh"

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
  constexpr Arrivals counts = arrivals(shape);
  const SharedLayout l = shared_layout(shape, ptx::shared_address(shared));
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  tile::poison_shared(shared, shared_bytes(shape));
  if (threadIdx.x == 0) {
    for (int s = 0; s < stage_count(shape); ++s) {
      ptx::mbarrier_init(l.full + 8 * s, counts.full);
      ptx::mbarrier_init(l.empty + 8 * s, counts.empty);
    }
    for (int i = 0; i < kItemSlots; ++i) {
      ptx::mbarrier_init(l.item_full + 8 * i, counts.item_full);
      ptx::mbarrier_init(l.item_empty + 8 * i, counts.item_empty);
    }
    for (int w = 0; w < 2 && shape.epilogue_warps() > 0; ++w) {
      ptx::mbarrier_init(l.dump_full + 8 * w, counts.dump_full);
      ptx::mbarrier_init(l.dump_empty + 8 * w, counts.dump_empty);
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
