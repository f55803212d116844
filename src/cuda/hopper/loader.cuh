// The loader warps of the grouped GEMM. Included by grouped_gemm.cuh only.
#pragma once

namespace sonicmoe::cuda::hopper {

// kRows: lane l of loader warp v copies chunk l % 8 of tile rows 4i + l / 8, for its share of
// i = 0..31. The rows' offsets stay in registers for the whole tile: a shared load in front of each
// copy would cost its latency.
template <int kWarps>
class RowGather {
 public:
  static constexpr int kCopies = (32 + kWarps - 1) / kWarps;
  __device__ RowGather(int warp, int lane) : first_(warp * kCopies), lane_(lane) {}

  __device__ void begin_tile(const OperandParams& p, const Item& t) {
    const int last = t.rows - 1;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = t.row0 + min(4 * (first_ + i) + lane_ / 8, last);
      offset_[i] = p.row_token == nullptr ? row : __ldg(p.row_token + row);
    }
#pragma unroll
    for (int i = 0; i < kCopies; ++i) offset_[i] *= p.gathered_ld / 8;
    copies_ = (t.rows + 3) / 4 - first_;
  }

  __device__ void copy(const OperandParams& p, uint32_t a, int k) const {
    const int chunk = lane_ & 7, column = k * kBlockK + chunk * 8;
    const bool inside = column < p.depth;  // else zeros: 0 * NaN would poison the row
    const uint4* source = reinterpret_cast<const uint4*>(p.gathered) + (inside ? column / 8 : 0);
    const uint32_t to = a + first_ * 512 + (lane_ / 8) * 128;
    const uint32_t swizzled = chunk ^ (lane_ / 8) ^ (first_ % 2 * 4);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (i < copies_) {
        // Row 4 (first + i) + lane / 8: its low three bits are lane / 8, plus 4 where first + i is
        // odd.
        const uint32_t at = to + i * 512 + ((swizzled ^ (i % 2 * 4)) << 4);
        ptx::cp_async_16(at, source + offset_[i], inside ? 16 : 0);
      }
    }
  }

 private:
  int first_, lane_, copies_ = 0;
  uint32_t offset_[kCopies];
};

// kDepth: 64 rows of the expert x 128 columns of d. Lane l of loader warp v copies chunk l % 16 of
// rows 2i + l / 16, for its share of i = 0..31. The tokens of the next 64 rows are loaded one
// k-tile ahead, and all offsets are shuffled out before the first copy: a shuffle in front of each
// copy would cost its latency.
template <int kWarps>
class DepthGather {
 public:
  static constexpr int kCopies = (32 + kWarps - 1) / kWarps;
  static constexpr int kTokens = (2 * kCopies + 31) / 32;  // per lane
  __device__ DepthGather(int warp, int lane) : row0_(warp * 2 * kCopies), lane_(lane) {}

  __device__ void begin_tile(const OperandParams& p, const Item& t) { fetch(p, t, 0); }

  __device__ void copy(const OperandParams& p, const Item& t, uint32_t a, int k) {
    uint32_t offset[kCopies];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      offset[i] = __shfl_sync(~0u, token_[i / 16], (2 * i + lane_ / 16) & 31);
    }
    fetch(p, t, k + 1);
    const int chunk = lane_ & 15, column = t.m * kBlockM + chunk * 8;
    const bool inside = column < p.depth;
    const uint4* source = reinterpret_cast<const uint4*>(p.gathered) + (inside ? column / 8 : 0);
    const int rows = inside ? t.rows - k * kBlockK - row0_ - lane_ / 16 : 0;
    const uint32_t to = a + (chunk / 8) * tile::kBlockBytes + (row0_ + lane_ / 16) * 128;
    const uint32_t swizzled = (chunk % 8) ^ (lane_ / 16) ^ (row0_ & 7);  // row0_ is even
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const uint32_t low = kWarps == 3 ? (row0_ + 2 * i ^ row0_) & 7 : 2 * i & 7;
      const uint32_t at = to + i * 256 + ((swizzled ^ low) << 4);
      if (32 % kWarps == 0 || row0_ + 2 * i < kBlockK) {
        ptx::cp_async_16(at, source + offset[i], 2 * i < rows ? 16 : 0);
      }
    }
  }

 private:
  __device__ void fetch(const OperandParams& p, const Item& t, int k) {
    const int last = t.row0 + t.rows - 1;
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      const int row = min(t.row0 + k * kBlockK + row0_ + 32 * j + lane_, last);
      const int token = p.row_token == nullptr || t.rows == 0 ? row : __ldg(p.row_token + row);
      token_[j] = token * (p.gathered_ld / 8);
    }
  }
  int row0_, lane_;
  uint32_t token_[kTokens];  // offsets of the rows' tokens, in 16-byte chunks
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

// kDepth: B of a full k-tile by TMA. One thread.
template <class Spec>
__device__ void load_depth_boxes(const OperandParams& p, const Item& t, uint32_t b, uint32_t full,
                                 int k) {
  constexpr GemmShape s = Spec::shape;
  ptx::mbarrier_arrive_expect_tx(full, s.block_n * kBlockK * 2);
#pragma unroll
  for (int i = 0; i < s.block_n / 64; ++i) {
    ptx::tma_load(b + i * tile::kBlockBytes, &p.b, full, t.n * s.block_n + i * 64,
                  t.row0 + k * kBlockK);
  }
}

// kDepth: B of an expert's last, partial k-tile, by all loader warps. A TMA box would bring rows of
// the next expert (or rows nobody wrote): their product with A's zeros is NaN when they are not
// finite. Rows past the end arrive as zeros instead.
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

template <class Spec, class Items>
__device__ void load_items(const OperandParams& p, const SharedLayout& l, Items items, int warp,
                           int lane) {
  constexpr GemmShape s = Spec::shape;
  static_assert(s.grouping == Grouping::kRows || s.gather);
  static_assert(s.loader_warps == 1 || s.gather);
  const bool leader = warp == 0 && lane == 0;  // issues TMA
  if (leader) {
    ptx::prefetch_tensormap(&p.b);
    if constexpr (!s.gather) ptx::prefetch_tensormap(&p.a);
  }
  tile::RingState<stage_count(s)> ring;
  [[maybe_unused]] RowGather<s.loader_warps> row_gather(warp, lane);
  [[maybe_unused]] DepthGather<s.loader_warps> depth_gather(warp, lane);
  for (Item t; items.next(t);) {
    if constexpr (s.grouping == Grouping::kDepth) {
      depth_gather.begin_tile(p, t);
    } else if constexpr (s.gather) {
      row_gather.begin_tile(p, t);
    }
    for (int k = 0; k < t.k_tiles; ++k) {
      const uint32_t full = l.full + 8 * ring.stage;
      tile::wait(l.empty + 8 * ring.stage, ring.parity ^ 1, Role::kLoader, Slot::kEmpty,
                 ring.stage);
      const uint32_t a = l.ring + ring.stage * stage_bytes(s), b = a + kBlockM * kBlockK * 2;
      if constexpr (s.grouping == Grouping::kRows) {
        if (leader) load_boxes<Spec>(p, t, a, b, full, k);
        __syncwarp();
        if constexpr (s.gather) row_gather.copy(p, a, k);
      } else {
        if ((k + 1) * kBlockK <= t.rows) {
          if (leader) load_depth_boxes<Spec>(p, t, b, full, k);
          __syncwarp();
        } else {
          if (leader) ptx::mbarrier_arrive(full);
          __syncwarp();
          copy_depth_tail<Spec>(p, t, b, k, warp, lane);
        }
        depth_gather.copy(p, t, a, k);
      }
      // Each lane's copies arrive by themselves once they have landed.
      if constexpr (s.gather) ptx::cp_async_mbarrier_arrive_noinc(full);
      __syncwarp();
      ring.advance();
    }
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
