// The math warpgroups of the grouped GEMM.
#pragma once

#include <type_traits>

#include "cuda/hopper/mainloop/schedule.cuh"
#include "cuda/hopper/shape.hpp"
#include "cuda/hopper/tile/pipeline.cuh"
#include "cuda/hopper/tile/swizzle.cuh"
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace sonicmoe::cuda::hopper {

// Rounds warpgroup w's 64 x block_n sums to bf16 and writes them to its half of the dump tile.
// kRows: 64 rows in blocks of 64 columns (tile::dump_offset). kTransposed: block_n rows of the 64
// columns that the warpgroup's tile rows become.
template <Dump kDump, int kCount>
__device__ void dump_accumulators(const float (&acc)[kCount], uint32_t half, int warp, int lane) {
#pragma unroll
  for (int j = 0; j < kCount / 8; ++j) {  // 16 columns each
    const uint32_t r0 = ptx::pack_bf16x2(acc[8 * j], acc[8 * j + 1]);
    const uint32_t r1 = ptx::pack_bf16x2(acc[8 * j + 2], acc[8 * j + 3]);
    const uint32_t r2 = ptx::pack_bf16x2(acc[8 * j + 4], acc[8 * j + 5]);
    const uint32_t r3 = ptx::pack_bf16x2(acc[8 * j + 6], acc[8 * j + 7]);
    if constexpr (kDump == Dump::kTransposed) {
      const int row = 16 * j + 8 * (lane >> 4) + (lane & 7);
      const int chunk = 2 * (warp & 3) + ((lane >> 3) & 1);
      ptx::stmatrix_x4_trans(half + tile::chunk_offset(row, chunk), r0, r1, r2, r3);
    } else {
      const int row = (warp & 3) * 16 + (lane & 15);
      ptx::stmatrix_x4(half + tile::dump_offset(row, 2 * j + (lane >> 4)), r0, r1, r2, r3);
    }
  }
}

// The ring as a math warp sees it, and its way to the epilogue warps.
template <class Spec>
class MathPipes {
 public:
  static constexpr GemmShape s = Spec::shape;
  __device__ MathPipes(const SharedLayout& l, int warp, int lane)
      : l_(l), w_(warp / 4), lane_(lane), stores_(s.bulk_stores() && warp % 4 == 0 && lane == 0) {}

  __device__ uint32_t stage() const { return ring_.stage; }
  __device__ void wait_full() {
    tile::wait(l_.full + 8 * ring_.stage, ring_.parity, Role::kMath, Slot::kFull, ring_.stage);
    // cp.async wrote through the generic proxy, wgmma reads through the async one.
    if constexpr (s.gather) ptx::fence_proxy_async_shared();
  }
  __device__ void advance() { ring_.advance(); }
  // Whether the next stage is full while the products of this one still run.
  __device__ bool next_is_full_in_time() const {
    constexpr uint32_t kClocks = 3 * s.block_n;  // of the 4 * block_n that both warpgroups take
    const uint32_t start = clock();
    do {
      if (ptx::mbarrier_test_wait(l_.full + 8 * ring_.stage, ring_.parity)) return true;
    } while (static_cast<uint32_t>(clock()) - start < kClocks);
    return false;
  }
  // One arrival per warp: wgmma.wait_group proves only this warp's share done.
  __device__ void release(uint32_t stage) {
    if (lane_ == 0) ptx::mbarrier_arrive(l_.empty + 8 * stage);
  }
  // The half of the dump tile is free: the epilogue warps, or this warpgroup's own store, have read
  // it.
  __device__ void wait_dump_empty() {
    if constexpr (s.bulk_stores()) {
      finish_stores();
      ptx::named_barrier_sync(barrier_of_half(w_), 32 * kHalfWarps);
    } else {
      tile::wait(l_.dump_empty + 8 * w_, dump_parity_, Role::kMath, Slot::kDumpEmpty, w_);
      dump_parity_ ^= 1;
    }
  }
  // The half is written: store() by one thread, or the epilogue warps' turn.
  template <class Store>
  __device__ void hand_over_dump(Store store) {
    if constexpr (s.bulk_stores()) {
      ptx::fence_proxy_async_shared();
      ptx::named_barrier_sync(barrier_of_half(w_), 32 * kHalfWarps);
      tile::pause(Role::kEpilogue, Slot::kDumpFull, w_);
      if (!stores_) return;
      store();
      ptx::bulk_commit_group();
    } else {
      if constexpr (s.dump_by_tma()) ptx::fence_proxy_async_shared();
      __syncwarp();
      if (lane_ == 0) ptx::mbarrier_arrive(l_.dump_full + 8 * w_);
    }
  }
  // Shared memory may be overwritten, or given back.
  __device__ void finish_stores() {
    if (stores_) ptx::bulk_wait_group_read<0>();
  }
  __device__ uint32_t half() const { return l_.dump + w_ * half_dump_bytes(s); }

 private:
  const SharedLayout& l_;
  int w_, lane_;
  bool stores_;  // this thread issues the warpgroup's stores
  tile::RingState<stage_count(s)> ring_;
  uint32_t dump_parity_ = 1;
};

// Rounds the sums into the dump tile and passes it on.
template <class Spec, int kCount>
__device__ void dump_half(const Params<Spec>& p, const Item& t, const float (&acc)[kCount],
                          MathPipes<Spec>& pipes, int warp, int lane) {
  constexpr GemmShape s = Spec::shape;
  if constexpr (s.dump != Dump::kDirect) {
    pipes.wait_dump_empty();
    dump_accumulators<s.dump>(acc, pipes.half(), warp, lane);
    pipes.hand_over_dump([&] {
      if constexpr (Spec::shape.bulk_stores()) {
        Spec::Epilogue::store(p.epilogue, t, warp / 4, pipes.half());
      }
    });
  }
}

// The rows of a half that this math warp stores itself (store.cuh), if any. It also wrote and will
// overwrite them, so no barrier is needed. Made while the last products still run.
template <class Spec>
class MathWarpStores {
 public:
  __device__ MathWarpStores(const Params<Spec>&, const Item&, int, int) {}
  template <int kCount>
  __device__ void store(const Params<Spec>&, const Item&, uint32_t, int, int, float (&)[kCount]) {}
};

template <class Spec>
  requires(!std::is_void_v<typename Spec::MathWarpEpilogue>)
class MathWarpStores<Spec> {
 public:
  __device__ MathWarpStores(const Params<Spec>& p, const Item& t, int warp, int lane)
      : state_(p.epilogue, t, warp / 4, warp % 4, lane) {}

  // After the dump. Zeroes `acc`: the next tile's fence_accumulators() would else keep the old sums
  // in their registers.
  template <int kCount>
  __device__ void store(const Params<Spec>& p, const Item& t, uint32_t half, int warp, int lane,
                        float (&acc)[kCount]) {
    tile::pause(Role::kMath, Slot::kDumpFull, warp / 4);
    typename Spec::MathWarpEpilogue(p.epilogue, t, warp / 4, warp % 4, lane, state_).store(half);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kCount; ++i) acc[i] = 0.0f;
  }

 private:
  typename Spec::MathWarpEpilogue::State state_;
};

// A half without products: a dead warpgroup (nothing will read its dump) or, along the depth, an
// expert without rows, whose gradient is zero and still written.
template <class Spec>
__device__ void skip_item(const Params<Spec>& p, const Item& t, MathPipes<Spec>& pipes, int warp,
                          int lane) {
  constexpr GemmShape s = Spec::shape;
  for (int k = 0; k < t.k_tiles; ++k) {
    pipes.wait_full();
    pipes.release(pipes.stage());
    pipes.advance();
  }
  if constexpr (s.grouping == Grouping::kDepth) {
    float zeros[s.block_n / 2] = {};
    Spec::Epilogue::finish(p.epilogue, t, zeros, warp, lane);
    dump_half<Spec>(p, t, zeros, pipes, warp, lane);
  } else if constexpr (s.dump != Dump::kDirect) {
    pipes.wait_dump_empty();
    pipes.hand_over_dump([] {});
  }
}

// kDepth, an expert of fewer rows than a k-tile: zeros in the rows of B past its end, where the box
// brought rows of the next expert. Each warpgroup writes all of them, for its own products.
template <class Spec>
__device__ void zero_rows_past_end(uint32_t b, int rows, int warp, int lane) {
  const int thread = warp % kHalfWarps * 32 + lane;
#pragma unroll
  for (int block = 0; block < Spec::shape.block_n / 64; ++block) {
#pragma unroll 1
    for (int i = rows * 8 + thread; i < kBlockK * 8; i += 32 * kHalfWarps) {
      ptx::store_shared_v4(b + block * tile::kBlockBytes + 16 * i, uint4{});
    }
  }
  ptx::fence_proxy_async_shared();
  ptx::named_barrier_sync(barrier_of_half(warp / kHalfWarps), 32 * kHalfWarps);
}

template <class Spec>
__device__ void math_role(const Params<Spec>& p, const SharedLayout& l, int warp, int lane) {
  constexpr GemmShape s = Spec::shape;
  const int w = warp / 4;
  const uint32_t a_half = s.a == Major::kK ? 64 * 128 : tile::kBlockBytes;
  const uint64_t a0 = tile::make_descriptor(l.ring + w * a_half, s.a);
  const uint64_t b0 = tile::make_descriptor(l.ring + kStageABytes, s.b);
  MathPipes<Spec> pipes(l, warp, lane);
  float acc[s.block_n / 2];
  ItemSink<Spec> items(p.operands, l, lane, Role::kMath);
  for (Item t; items.next(t);) {
    const bool live = s.grouping == Grouping::kDepth ? t.k_tiles > 0 : t.rows > 64 * w;
    if (!live) {
      skip_item<Spec>(p, t, pipes, warp, lane);
      continue;
    }
    // Stages whose products are issued but not yet known to be complete: `previous`, or none.
    bool pending = false;
    uint32_t previous = 0;
    for (int k = 0; k < t.k_tiles; ++k) {
      pipes.wait_full();
      if constexpr (s.grouping == Grouping::kDepth) {
        if (t.rows < kBlockK) {
          zero_rows_past_end<Spec>(b_of_stage(l, s, pipes.stage()), t.rows, warp, lane);
        }
      }
      const uint64_t a = tile::advance_descriptor(a0, pipes.stage() * stage_bytes(s));
      const uint64_t b = tile::advance_descriptor(b0, pipes.stage() * stage_bytes(s));
      ptx::fence_accumulators(acc);
      ptx::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < kBlockK / 16; ++kk) {
        ptx::Wgmma<s.block_n, s.a, s.b>::mma(
            acc, tile::advance_descriptor(a, kk * tile::k16_bytes(s.a)),
            tile::advance_descriptor(b, kk * tile::k16_bytes(s.b)), (k | kk) != 0);
      }
      ptx::wgmma_commit_group();
      ptx::fence_accumulators(acc);
      ptx::wgmma_wait_group<1>();
      if (pending) pipes.release(previous);
      previous = pipes.stage();
      pending = true;
      pipes.advance();
      // Short of data there is nothing to overlap: hand this stage back as soon as it is read, not
      // when the next has come.
      if (p.operands.early_release && k + 1 < t.k_tiles && !pipes.next_is_full_in_time()) {
        ptx::wgmma_wait_group<0>();
        pipes.release(previous);
        pending = false;
      }
    }
    MathWarpStores<Spec> own(p, t, warp, lane);
    ptx::wgmma_wait_group<0>();
    ptx::fence_accumulators(acc);
    pipes.release(previous);  // of the last k-tile, which is never handed back early
    Spec::Epilogue::finish(p.epilogue, t, acc, warp, lane);
    dump_half<Spec>(p, t, acc, pipes, warp, lane);
    own.store(p, t, pipes.half(), warp, lane, acc);
  }
  pipes.finish_stores();
}

}  // namespace sonicmoe::cuda::hopper
