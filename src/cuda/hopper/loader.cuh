// The loader warps of the grouped GEMM. Included by grouped_gemm.cuh only.
#pragma once

namespace sonicmoe::cuda::hopper {

// Copies of one k-tile have a latency of some 3000 clocks until math can use them, and the ring
// covers less: whatever a loader warp does between the wait for an empty stage and its last copy
// costs products. So everything that does not depend on the stage is computed before that wait
// (prepare), and a k-tile without rows or columns to leave out takes a path without predicates.

// kRows: lane l of loader warp v copies chunk l % 8 of tile rows 4i + l / 8, for its share of
// i = 0..31. The rows' offsets stay in registers for the whole tile: a shared load in front of each
// copy would cost its latency.
template <int kWarps>
class RowGather {
 public:
  static constexpr int kCopies = (32 + kWarps - 1) / kWarps;
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
  // The other half of an aligned 256 bytes, half the time the row's next k-tile, is fetched too: 3%
  // faster.
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
// with zeros is NaN where they are not finite.)
struct DepthTile {
  int first;     // row of the expert at which it starts
  int repeated;  // rows at its start that are not summed again
  __device__ DepthTile(const Item& t, int k)
      : first(min(k * kBlockK, max(t.rows - kBlockK, 0))), repeated(k * kBlockK - first) {}
};

// kDepth: 64 rows of the expert x 128 columns of d. Lane l of loader warp v copies chunk l % 16 of
// rows 2i + l / 16, for its share of i = 0..31. The tokens of the next 64 rows are loaded one
// k-tile ahead, also across items, and passed between lanes by shuffles.
template <int kWarps>
class DepthGather {
 public:
  static constexpr int kCopies = (32 + kWarps - 1) / kWarps;
  static constexpr int kTokens = (2 * kCopies + 31) / 32;  // per lane
  __device__ DepthGather(int warp, int lane) : row0_(warp * 2 * kCopies), lane_(lane) {
    const int chunk = lane & 15;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      to_[j] =
          chunk / 8 * tile::kBlockBytes + tile::chunk_offset(row0_ + 2 * j + lane / 16, chunk % 8);
    }
  }

  __device__ void begin_tile(const OperandParams& p, const Item& t) {
    if (!fetched_ && t.rows > 0) fetch(p, t.row0, t.rows);
  }

  __device__ void prepare(const OperandParams& p, const Item& t, const Item& next, int k) {
    const int column = t.m * kBlockM + (lane_ & 15) * 8;
    const bool inside = column < p.depth;
    const bf16* source = p.gathered + (inside ? column : 0);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const uint32_t token = __shfl_sync(~0u, token_[i / 16], (2 * i + lane_ / 16) & 31);
      source_[i] = source + uint64_t{token} * p.gathered_ld;
    }
    const DepthTile tile(t, k);
    begin_ = tile.repeated - row0_ - lane_ / 16;
    end_ = inside ? t.rows - tile.first - row0_ - lane_ / 16 : 0;
    whole_ = tile.repeated == 0 && t.rows - tile.first >= kBlockK && (t.m + 1) * kBlockM <= p.depth;
    const bool last = k + 1 == t.k_tiles;
    fetched_ = last && next.k_tiles > 0;
    const int first = last ? 0 : DepthTile(t, k + 1).first;
    fetch(p, (last ? next.row0 : t.row0) + first, (last ? next.rows : t.rows) - first);
  }

  __device__ void copy(uint32_t a) const {
    const uint32_t to[4] = {a + to_[0], a + to_[1], a + to_[2], a + to_[3]};
    if (whole_) {
      for_each_copy([&](int i) { ptx::cp_async_16(to[i % 4] + i / 4 * 1024, source_[i]); });
    } else {
      for_each_copy([&](int i) {
        const bool inside = 2 * i >= begin_ && 2 * i < end_;
        ptx::cp_async_16(to[i % 4] + i / 4 * 1024, source_[i], inside ? 16 : 0);
      });
    }
  }

 private:
  template <class F>
  __device__ void for_each_copy(F copy) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (32 % kWarps != 0 && row0_ + 2 * i >= kBlockK) break;
      copy(i);
    }
  }
  // The tokens of this warp's rows of the k-tile that starts at row `first` with `rows` rows left.
  // No branch and no arithmetic on what is loaded: the warp would wait for it here and not at its
  // use, a k-tile later.
  __device__ void fetch(const OperandParams& p, int first, int rows) {
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      const int row = max(first + min(row0_ + 32 * j + lane_, rows - 1), 0);
      token_[j] = p.row_token == nullptr ? row : __ldg(p.row_token + row);
    }
  }
  int row0_, lane_, begin_ = 0, end_ = 0;
  bool fetched_ = false;  // token_ is of the next item's first k-tile already
  bool whole_ = false;
  uint32_t to_[4];           // offsets in the stage of the first four rows
  uint32_t token_[kTokens];  // of the next k-tile's rows
  const bf16* source_[kCopies];
};

// Box i of the B tile: which part (gate, up) and first column it holds.
struct Box {
  int part, column;
};
template <int kBoxes, int kColumns>
__device__ Box box_of_b(const OperandParams& p, int n, int i) {
  if (!p.paired) return {0, (n * kBoxes + i) * kColumns};
  constexpr int half = kBoxes / 2;
  return {i / half, (n * half + i % half) * kColumns};
}

// kRows: A (unless gathered) and B of one k-tile. One thread.
template <class Spec>
__device__ void load_boxes(const OperandParams& p, const Item& t, uint32_t a, uint32_t b,
                           uint32_t full, int k) {
  constexpr GemmShape s = Spec::shape;
  constexpr int b_bytes = s.block_n * kBlockK * 2;
  const int depth = k * kBlockK;
  if constexpr (s.gather) {
    ptx::mbarrier_arrive_expect_tx(full, b_bytes);
  } else {
    const bool both = t.rows > 64;
    ptx::mbarrier_arrive_expect_tx(full, b_bytes + (both ? 2 : 1) * tile::kBlockBytes);
    ptx::tma_load(a, &p.a, full, depth, t.row0);
    if (both) ptx::tma_load(a + tile::kBlockBytes, &p.a, full, depth, t.row0 + 64);
  }
  if constexpr (s.b == Major::kK) {
    constexpr int columns = s.block_n / 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Box box = box_of_b<2, columns>(p, t.n, i);
      ptx::tma_load(b + i * columns * 128, &p.b, full, depth, p.first_column + box.column, box.part,
                    t.expert);
    }
  } else {
    constexpr int boxes = s.block_n / 64;
#pragma unroll
    for (int i = 0; i < boxes; ++i) {
      const Box box = box_of_b<boxes, 64>(p, t.n, i);
      ptx::tma_load(b + i * tile::kBlockBytes, &p.b, full, p.first_column + box.column, depth,
                    box.part, t.expert);
    }
  }
}

// kDepth: B of a k-tile by TMA. One thread.
template <class Spec>
__device__ void load_depth_boxes(const OperandParams& p, const Item& t, uint32_t b, uint32_t full,
                                 int k) {
  constexpr GemmShape s = Spec::shape;
  ptx::mbarrier_arrive_expect_tx(full, s.block_n * kBlockK * 2);
#pragma unroll
  for (int i = 0; i < s.block_n / 64; ++i) {
    ptx::tma_load(b + i * tile::kBlockBytes, &p.b, full, t.n * s.block_n + i * 64,
                  t.row0 + DepthTile(t, k).first);
  }
}

// kDepth: B of an expert with fewer rows than a k-tile, by all loader warps: rows past its end
// arrive as zeros.
template <class Spec>
__device__ void copy_depth_tail(const OperandParams& p, const Item& t, uint32_t b, int k, int warp,
                                int lane) {
  constexpr int kBlocks = Spec::shape.block_n / 64;
  const int rows = t.rows - k * kBlockK, chunk = lane & 7;
  for (int block = warp; block < kBlocks; block += Spec::shape.loader_warps) {
    const int column = t.n * Spec::shape.block_n + block * 64 + chunk * 8;
#pragma unroll 4
    for (int i = 0; i < 16; ++i) {
      const int row = 4 * i + lane / 8;
      const bool inside = row < rows && column < p.b_columns;
      const bf16* source =
          inside ? p.b_rows + (int64_t{t.row0} + k * kBlockK + row) * p.b_rows_ld + column
                 : p.b_rows;
      ptx::cp_async_16(b + block * tile::kBlockBytes + tile::chunk_offset(row, chunk), source,
                       inside ? 16 : 0);
    }
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
    for (int k = 0; k < t.k_tiles; ++k) {
      if constexpr (s.gather) gather.prepare(p, k);
      const uint32_t full = l.full + 8 * ring.stage;
      tile::wait(l.empty + 8 * ring.stage, ring.parity ^ 1, Role::kLoader, Slot::kEmpty,
                 ring.stage);
      const uint32_t a = l.ring + ring.stage * stage_bytes(s), b = a + kBlockM * kBlockK * 2;
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

// kDepth. Knows its next item while it loads one, so that no item starts with a wait for its rows'
// tokens.
template <class Spec, class Items>
__device__ void load_depth(const OperandParams& p, const SharedLayout& l, Items items, int warp,
                           int lane) {
  constexpr GemmShape s = Spec::shape;
  static_assert(s.gather);
  const bool leader = warp == 0 && lane == 0;  // issues TMA
  if (leader) ptx::prefetch_tensormap(&p.b);
  tile::RingState<stage_count(s)> ring;
  DepthGather<s.loader_warps> gather(warp, lane);
  Item t{}, next{};
  for (bool more = items.next(t); more; t = next) {
    more = items.next(next);
    if (!more) next.rows = next.k_tiles = 0;
    gather.begin_tile(p, t);
    for (int k = 0; k < t.k_tiles; ++k) {
      gather.prepare(p, t, next, k);
      const uint32_t full = l.full + 8 * ring.stage;
      tile::wait(l.empty + 8 * ring.stage, ring.parity ^ 1, Role::kLoader, Slot::kEmpty,
                 ring.stage);
      const uint32_t a = l.ring + ring.stage * stage_bytes(s), b = a + kBlockM * kBlockK * 2;
      if (t.rows >= kBlockK) {
        if (leader) load_depth_boxes<Spec>(p, t, b, full, k);
        __syncwarp();
      } else {
        if (leader) ptx::mbarrier_arrive(full);
        __syncwarp();
        copy_depth_tail<Spec>(p, t, b, k, warp, lane);
      }
      gather.copy(a);
      ptx::cp_async_mbarrier_arrive_noinc(full);
      __syncwarp();
      ring.advance();
    }
  }
}

template <class Spec, class Items>
__device__ void load_items(const OperandParams& p, const SharedLayout& l, Items items, int warp,
                           int lane) {
  if constexpr (Spec::shape.grouping == Grouping::kRows) {
    load_rows<Spec>(p, l, items, warp, lane);
  } else {
    load_depth<Spec>(p, l, items, warp, lane);
  }
}

template <class Spec>
__device__ void load_role(const OperandParams& p, const SharedLayout& l, int warp, int lane) {
  if (warp == 0) {
    load_items<Spec>(p, l, ItemSource<Spec>(p, l, lane), warp, lane);
  } else if constexpr (Spec::shape.loader_warps > 1) {
    load_items<Spec>(p, l, ItemSink<Spec>(p, l, lane, Role::kLoader), warp, lane);
  }
}

}  // namespace sonicmoe::cuda::hopper
