// The loader warps of the grouped GEMM.
#pragma once

#include "cuda/hopper/mainloop/schedule.cuh"
#include "cuda/hopper/shape.hpp"
#include "cuda/hopper/tile/pipeline.cuh"
#include "cuda/hopper/tile/swizzle.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"

namespace sonicmoe::cuda::hopper {

// Copies of one k-tile have a latency of some 3000 clocks until math can use them, and the ring
// covers less: whatever a loader warp does between the wait for an empty stage and its last copy
// costs products. So everything that does not depend on the stage is computed before that wait
// (prepare), and a k-tile without rows or columns to leave out takes a path without predicates.

// kRows: lane l of gather warp v copies chunk l % 8 of tile rows 4i + l / 8, for its share of
// i = 0..31. The rows' offsets stay in registers for the whole tile: a shared load in front of each
// copy would cost its latency.
template <int kWarps>
class RowGather {
 public:
  static constexpr int kCopies = 32 / kWarps;
  static_assert(32 % kWarps == 0);
  __device__ RowGather(int warp, int lane) : first_(warp * kCopies), chunk_(lane & 7) {
    const int row = 4 * first_ + lane / 8;
#pragma unroll
    for (int j = 0; j < 2; ++j) to_[j] = tile::chunk_offset(row + 4 * j, chunk_);
    row_ = lane / 8;
  }

  __device__ void begin_tile(const OperandParams& p, const Item& t) {
    const int last = t.rows - 1;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = t.row0 + min(4 * (first_ + i) + row_, last);
      offset_[i] = p.row_token == nullptr ? row : __ldg(p.row_token + row);
    }
#pragma unroll
    for (int i = 0; i < kCopies; ++i) offset_[i] *= p.gathered_ld / 8;
    copies_ = (t.rows + 3) / 4 - first_;
  }

  __device__ void prepare(const OperandParams& p, int k) {
    const int column = k * kBlockK + chunk_ * 8;
    inside_ = column < p.depth;  // else zeros: 0 * NaN would poison the row
    source_ = reinterpret_cast<const uint4*>(p.gathered) + (inside_ ? column / 8 : 0);
    whole_ = copies_ >= kCopies && (k + 1) * kBlockK <= p.depth;
  }

  __device__ void copy(uint32_t a) const {
    const uint32_t to[2] = {a + to_[0], a + to_[1]};
    if (whole_) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        ptx::cp_async_16<kFetch>(to[i % 2] + i / 2 * 1024, source_ + offset_[i]);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (i < copies_) {
        ptx::cp_async_16<kFetch>(to[i % 2] + i / 2 * 1024, source_ + offset_[i], inside_ ? 16 : 0);
      }
    }
  }

 private:
  // The other half of an aligned 256 bytes, half the time the row's next k-tile, is fetched too
  // (lab M9).
  static constexpr ptx::Fetch kFetch = ptx::Fetch::k256;
  int first_, chunk_, row_, copies_ = 0;
  bool inside_ = false, whole_ = false;
  uint32_t to_[2];  // offsets in the stage of rows 4 first and 4 (first + 1)
  const uint4* source_ = nullptr;
  uint32_t offset_[kCopies];
};

// kDepth: the rows of k-tile k. The last k-tile ends where the expert ends and overlaps the one
// before it: A is zero in the rows that were summed there, so B may come whole and by TMA. (Cut at
// the expert's end, B would need zeros too: a box brings rows of the next expert, and their product
// with zeros is NaN where they are not finite. So it is for experts of fewer rows than a k-tile:
// the math warps write these zeros.)
struct DepthTile {
  int first;     // row of the expert at which it starts
  int repeated;  // rows at its start that are not summed again
  __device__ DepthTile(const Item& t, int k)
      : first(min(k * kBlockK, max(t.rows - kBlockK, 0))), repeated(k * kBlockK - first) {}
};

// kDepth: 64 rows of the expert x 128 columns of d. Lane l of gather warp v copies chunk l % 8 of
// rows 4i + l / 8, for its share of i = 0..15, in both blocks of 64 columns. Tokens are loaded two
// k-tiles ahead, also across items (as compiled they are waited for after one: all loads of tokens
// share a scoreboard), and passed between lanes by shuffles: few, since they queue for the
// load-store unit behind the copies.
template <int kWarps>
class DepthGather {
 public:
  static constexpr int kGroups = (16 + kWarps - 1) / kWarps;  // of four rows
  static_assert(4 * kGroups <= 32);                           // a lane holds one token of a k-tile
  __device__ DepthGather(int warp, int lane) : row0_(warp * 4 * kGroups), lane_(lane) {
#pragma unroll
    for (int j = 0; j < 2; ++j) to_[j] = tile::chunk_offset(row0_ + 4 * j + lane / 8, lane & 7);
  }

  __device__ void begin_tile(const OperandParams& p, const Item& t, const Item& next) {
    if (t.k_tiles == 0) return;
    if (!fetched_) {
      token_[0] = fetch(p, t, 0);
      token_[1] = fetch(p, t, 1);
    }
    if (t.k_tiles == 1) token_[1] = fetch(p, next, 0);
  }

  __device__ void prepare(const OperandParams& p, const Item& t, const Item& next, int k) {
    const int column = t.m * kBlockM + (lane_ & 7) * 8;
    inside_[0] = column < p.depth;
    inside_[1] = column + 64 < p.depth;
    const auto* source = reinterpret_cast<const char*>(p.gathered + (inside_[0] ? column : 0));
    const uint32_t row_bytes = kElementBytes * p.gathered_ld;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const uint32_t token = __shfl_sync(~0u, token_[0], 4 * i + lane_ / 8);
      source_[i] = source + uint64_t{token} * row_bytes;
    }
    const DepthTile tile(t, k);
    begin_ = tile.repeated - row0_ - lane_ / 8;
    end_ = t.rows - tile.first - row0_ - lane_ / 8;
    whole_ = tile.repeated == 0 && t.rows - tile.first >= kBlockK && (t.m + 1) * kBlockM <= p.depth;
    token_[0] = token_[1];
    const bool ours = k + 2 < t.k_tiles;
    token_[1] = fetch(p, ours ? t : next, ours ? k + 2 : k + 2 - t.k_tiles);
    fetched_ = next.k_tiles > 0;
  }

  __device__ void copy(uint32_t a) const {
    const uint32_t to[2] = {a + to_[0], a + to_[1]};
    if (whole_) {
      for_each_group([&](int i) {
        const uint32_t at = to[i % 2] + i / 2 * 1024;
        ptx::cp_async_16(at, source_[i]);
        ptx::cp_async_16(at + tile::kBlockBytes, source_[i] + 128);
      });
    } else {
      for_each_group([&](int i) {
        const uint32_t at = to[i % 2] + i / 2 * 1024;
        const bool inside = 4 * i >= begin_ && 4 * i < end_;
        ptx::cp_async_16(at, source_[i], inside && inside_[0] ? 16 : 0);
        ptx::cp_async_16(at + tile::kBlockBytes, source_[i] + (inside_[1] ? 128 : 0),
                         inside && inside_[1] ? 16 : 0);
      });
    }
  }

 private:
  template <class F>
  __device__ void for_each_group(F visit) const {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (16 % kWarps != 0 && row0_ + 4 * i >= kBlockK) break;
      visit(i);
    }
  }
  // The token of this lane's row of k-tile k, of the last row where the item ends before. No branch
  // and no arithmetic on what is loaded: the warp would wait for it here and not at its use.
  __device__ uint32_t fetch(const OperandParams& p, const Item& t, int k) const {
    const int row = max(t.row0 + min(DepthTile(t, k).first + row0_ + lane_, t.rows - 1), 0);
    return p.row_token == nullptr ? row : __ldg(p.row_token + row);
  }
  int row0_, lane_, begin_ = 0, end_ = 0;
  bool fetched_ = false;  // token_ is of the item's first two k-tiles already
  bool whole_ = false;
  bool inside_[2] = {};  // columns of the two blocks
  uint32_t to_[2];       // offsets in the stage of the first two groups' rows
  uint32_t token_[2];    // of the next two k-tiles' rows
  const char* source_[kGroups];
};

// kRows: A (unless gathered) and B of one k-tile. One thread.
template <class Spec>
__device__ void load_boxes(const OperandParams& p, const Item& t, uint32_t a, uint32_t b,
                           uint32_t full, int k) {
  constexpr GemmShape s = Spec::shape;
  constexpr int b_bytes = s.block_n * kBlockK * kElementBytes;
  const int depth = k * kBlockK;
  if constexpr (s.gather) {
    ptx::mbarrier_arrive_expect_tx(full, b_bytes);
  } else {
    const bool both = t.rows > 64;
    ptx::mbarrier_arrive_expect_tx(full, b_bytes + (both ? 2 : 1) * tile::kBlockBytes);
    ptx::tma_load(a, &p.a, full, depth, t.row0);
    if (both) ptx::tma_load(a + tile::kBlockBytes, &p.a, full, depth, t.row0 + 64);
  }
  const int columns = p.paired ? s.block_n / 2 : s.block_n;  // of a part
  const int column = p.first_column + t.n * columns;
  if constexpr (s.b == Major::kK) {
    ptx::tma_load(b, &p.b, full, depth, column, 0, t.expert);
  } else if (p.whole_boxes) {
    ptx::tma_load(b, &p.b, full, 0, depth, column / 64, 0, t.expert);
  } else {
#pragma unroll
    for (int i = 0; i < s.block_n / 64; ++i) {
      const int part = p.paired && i >= s.block_n / 128;
      ptx::tma_load(b + i * tile::kBlockBytes, &p.b, full, column + 64 * i - part * columns, depth,
                    part, t.expert);
    }
  }
}

// kDepth: bytes of B of a k-tile.
template <class Spec>
inline constexpr int kDepthBBytes = Spec::shape.block_n / 64 * tile::kBlockBytes;

// kDepth: B of a k-tile by TMA. One thread, which has announced its bytes.
template <class Spec>
__device__ void load_depth_boxes(const OperandParams& p, const Item& t, uint32_t b, uint32_t full,
                                 int k) {
  constexpr int kBlocks = Spec::shape.block_n / 64;
  const int row = t.row0 + DepthTile(t, k).first;
  if (p.whole_boxes) {
    ptx::tma_load(b, &p.b, full, 0, row, t.n * kBlocks);
    return;
  }
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    ptx::tma_load(b + i * tile::kBlockBytes, &p.b, full, (t.n * kBlocks + i) * 64, row);
  }
}

// kRows.
template <class Spec, class Items>
__device__ void load_rows(const OperandParams& p, const SharedLayout& l, Items items, int warp,
                          int lane) {
  constexpr GemmShape s = Spec::shape;
  static_assert(s.loader_warps == 1 || s.gather);
  const bool leader = warp == 0 && lane == 0;  // issues TMA
  if (leader) {
    ptx::prefetch_tensormap(&p.b);
    if constexpr (!s.gather) ptx::prefetch_tensormap(&p.a);
  }
  tile::RingState<stage_count(s)> ring;
  RowGather<s.loader_warps> gather(warp, lane);
  for (Item t; items.next(t);) {
    if constexpr (s.gather) gather.begin_tile(p, t);
    if constexpr (!s.gather) items.await_others();
    for (int k = 0; k < t.k_tiles; ++k) {
      if constexpr (s.gather) gather.prepare(p, k);
      const uint32_t full = l.full + 8 * ring.stage;
      tile::wait(l.empty + 8 * ring.stage, ring.parity ^ 1, Role::kLoader, Slot::kEmpty,
                 ring.stage);
      const uint32_t a = a_of_stage(l, s, ring.stage), b = b_of_stage(l, s, ring.stage);
      if (leader) load_boxes<Spec>(p, t, a, b, full, k);
      __syncwarp();
      if constexpr (s.gather) {
        gather.copy(a);
        // Each lane's copies arrive by themselves once they have landed.
        ptx::cp_async_mbarrier_arrive_noinc(full);
        __syncwarp();
      }
      ring.advance();
    }
  }
}

// kDepth, first loader warp: TMA alone. In a warp that gathers too, copies would wait behind it
// (lab M15).
template <class Spec, class Items>
__device__ void load_depth_b(const OperandParams& p, const SharedLayout& l, Items items, int lane) {
  constexpr GemmShape s = Spec::shape;
  if (lane == 0) ptx::prefetch_tensormap(&p.b);
  tile::RingState<stage_count(s)> ring;
  Item t{}, next{};
  for (bool more = items.next(t); more; t = next) {
    more = items.next(next);  // before t is loaded: the gather warps begin no item without the next
    for (int k = 0; k < t.k_tiles; ++k) {
      const uint32_t full = l.full + 8 * ring.stage;
      tile::wait(l.empty + 8 * ring.stage, ring.parity ^ 1, Role::kLoader, Slot::kEmpty,
                 ring.stage);
      if (lane == 0) {
        ptx::mbarrier_arrive_expect_tx(full, kDepthBBytes<Spec>);
        load_depth_boxes<Spec>(p, t, b_of_stage(l, s, ring.stage), full, k);
      }
      __syncwarp();
      ring.advance();
    }
  }
}

// kDepth, from sorted rows: the only loader warp, A and B by TMA. The k-tile that would end past
// the expert's rows is the copy of its last step, which stands behind them (cuda/sorted_rows.hpp);
// its zeros match the rows of B that DepthTile repeats.
template <class Spec, class Items>
__device__ void load_depth_sorted(const OperandParams& p, const SharedLayout& l, Items items,
                                  int lane) {
  constexpr GemmShape s = Spec::shape;
  if (lane == 0) {
    ptx::prefetch_tensormap(&p.a);
    ptx::prefetch_tensormap(&p.b);
  }
  tile::RingState<stage_count(s)> ring;
  for (Item t; items.next(t);) {
    const int row0 = sorted_row(t.row0, t.expert);
    for (int k = 0; k < t.k_tiles; ++k) {
      const uint32_t full = l.full + 8 * ring.stage;
      tile::wait(l.empty + 8 * ring.stage, ring.parity ^ 1, Role::kLoader, Slot::kEmpty,
                 ring.stage);
      const uint32_t a = a_of_stage(l, s, ring.stage), b = b_of_stage(l, s, ring.stage);
      if (lane == 0) {
        ptx::mbarrier_arrive_expect_tx(full, kStageABytes + kDepthBBytes<Spec>);
        const bool whole = (k + 1) * kBlockK <= t.rows;
        ptx::tma_load(a, &p.a, full, 0, row0 + (whole ? k * kBlockK : t.rows),
                      t.m * (kBlockM / 64));
        load_depth_boxes<Spec>(p, t, b, full, k);
      }
      __syncwarp();
      ring.advance();
    }
  }
}

// kDepth, gather warp `warp`. Knows its next item while it loads one, so that no item starts with a
// wait for its rows' tokens.
template <class Spec, class Items>
__device__ void load_depth_a(const OperandParams& p, const SharedLayout& l, Items items, int warp,
                             int lane) {
  constexpr GemmShape s = Spec::shape;
  static_assert(s.gather);
  tile::RingState<stage_count(s)> ring;
  DepthGather<s.gather_warps()> gather(warp, lane);
  Item t{}, next{};
  for (bool more = items.next(t); more; t = next) {
    more = items.next(next);
    if (!more) next.rows = next.k_tiles = 0;
    gather.begin_tile(p, t, next);
    for (int k = 0; k < t.k_tiles; ++k) {
      gather.prepare(p, t, next, k);
      const uint32_t full = l.full + 8 * ring.stage;
      tile::wait(l.empty + 8 * ring.stage, ring.parity ^ 1, Role::kLoader, Slot::kEmpty,
                 ring.stage);
      gather.copy(a_of_stage(l, s, ring.stage));
      ptx::cp_async_mbarrier_arrive_noinc(full);
      __syncwarp();
      ring.advance();
    }
  }
}

template <class Spec>
__device__ void load_role(const OperandParams& p, const SharedLayout& l, int warp, int lane) {
  constexpr GemmShape s = Spec::shape;
  if constexpr (s.grouping == Grouping::kRows) {
    if (warp == 0) {
      load_rows<Spec>(p, l, ItemSource<Spec>(p, l, lane), warp, lane);
    } else if constexpr (s.loader_warps > 1) {
      load_rows<Spec>(p, l, ItemSink<Spec>(p, l, lane, Role::kLoader), warp, lane);
    }
  } else if constexpr (!s.gather) {
    load_depth_sorted<Spec>(p, l, ItemSource<Spec>(p, l, lane), lane);
  } else if (warp == 0) {
    load_depth_b<Spec>(p, l, ItemSource<Spec>(p, l, lane), lane);
  } else {
    load_depth_a<Spec>(p, l, ItemSink<Spec>(p, l, lane, Role::kLoader), warp - 1, lane);
  }
}

}  // namespace sonicmoe::cuda::hopper
