// The product of mainloop.cuh,  D[e] = A[e] · B[e]ᵀ,  under either schedule of the two math
// warpgroups, which here store their own sums.
//   A [E, M, K] · B [E, N, K] (K-major) or [E, K, N] (MN-major) · D [E, M, N], all bf16
//   cooperative  both warpgroups work on every tile, on half of its rows each
//   pingpong     the warpgroups take whole tiles in turn: one stores while the other multiplies
// Persistent CTAs of 384 threads, alone or in pairs that share A or B. Tiles need not divide M and
// N: what lies outside is read as zeros and not stored.
// Roles       warps 0-3, 4-7 math · warp 8 loader · warps 9-11 idle
// Pipelines   full = 1 expect_tx per pass; empty = 1 per warp that reads the stage, in every CTA of
//             the cluster; order[w] = 4 warps of the other warpgroup (pingpong)
// Timeline    load: [per k] wait empty → TMA
//             math: wait order → [per k] wait full → wgmma → release k-1; arrive order → release;
//                   [per 16 x 64 block of a warp] round, dump, store
#pragma once

#include "bmm_problem.cuh"

namespace experiment::pingpong {

enum class Schedule { kCooperative, kPingpong };
enum class Pair { kNone, kSharedA, kSharedB };
// How a warp's dumped block leaves: by one tensor store of one lane, or by 16-byte stores of all,
// as production stores (row by row: tails, weights of rows and adding to rows cost nothing extra).
enum class Store { kTensor, kVectors };

struct Shape {
  Schedule schedule = Schedule::kPingpong;
  int block_m = 128;
  int block_n = 192;
  Pair pair = Pair::kNone;
  Major b = Major::kK;
  Store store = Store::kTensor;
};

// A thread of a 128 x 192 or 192 x 128 tile holds 192 sums. 2 * math + helper = 504 = 3 * 168,
// exactly what 384 threads are launched with.
inline constexpr int kMathRegisters = 232;
inline constexpr int kHelperRegisters = 40;
static_assert(2 * kMathRegisters + kHelperRegisters == 504);

inline constexpr int kBarrierBytes = 1024;
inline constexpr int kSlotBytes = 16 * 128;  // a warp's block of 16 x 64

template <Shape kShape>
struct Spec {
  static constexpr Shape shape = kShape;
  static constexpr bool pingpong = kShape.schedule == Schedule::kPingpong;
  static constexpr int threads = 384;
  static constexpr int cluster = kShape.pair == Pair::kNone ? 1 : 2;
  static constexpr int m_blocks = kShape.block_m / 64 / (pingpong ? 1 : 2);  // of a warpgroup
  static constexpr int n_blocks = kShape.block_n / 64;
  static constexpr int a_bytes = kShape.block_m * 128;
  static constexpr int stage_bytes = a_bytes + kShape.block_n * 128;
  // A warp's blocks of a tile pass through these slots of its own in turn. A divisor of their
  // number, so that a block's slot is known at compile time.
  static constexpr int slots = m_blocks * n_blocks % 4 == 0 ? 4 : 3;
  static_assert(m_blocks * n_blocks % slots == 0);
  static constexpr int dump_bytes = 8 * slots * kSlotBytes;
  static constexpr int stages = (232448 - kBarrierBytes - dump_bytes) / stage_bytes;
  static_assert(stages >= 3 && stages <= 8);
  static constexpr int shared_bytes = kBarrierBytes + stages * stage_bytes + dump_bytes;
};

struct Params {
  CUtensorMap a, b, d_map;
  bf16* d;           // [E, M, N]
  uint64_t* cycles;  // [blocks]
  int experts, m, n;
  int m_items, n_items, k_tiles;  // items: tiles, or pairs of tiles
};

// The items of a cluster.
struct Range {
  int first, step, end;
};

struct Item {
  int expert, row, column;  // of the tile's corner
};
template <class S>
__device__ Item item_at(const Params& p, int index, uint32_t rank) {
  const int rest = index / p.m_items;
  int m = index % p.m_items, n = rest % p.n_items;
  if constexpr (S::shape.pair == Pair::kSharedA) n = 2 * n + static_cast<int>(rank);
  if constexpr (S::shape.pair == Pair::kSharedB) m = 2 * m + static_cast<int>(rank);
  return {rest / p.n_items, m * S::shape.block_m, n * S::shape.block_n};
}

struct SharedLayout {
  uint32_t full, empty, order, ring, dump;
};
template <class S>
__device__ SharedLayout shared_layout(uint32_t base) {
  const uint32_t ring = base + kBarrierBytes;
  return {base, base + 64, base + 128, ring, ring + S::stages * S::stage_bytes};
}

// ------------------------------------------------------------------------------------------ loader

// kRows rows of 64 k of a K-major operand. Shared: this CTA's half of them, to both CTAs.
template <int kRows, bool kShared>
__device__ void load_k_major(const CUtensorMap* map, uint32_t to, uint32_t full, uint32_t rank,
                             int depth, int row, int expert) {
  if constexpr (kShared) {
    const uint32_t first = rank * (kRows / 2);
    ptx::tma_load_multicast(to + first * 128, map, full, 0b11, depth, row + static_cast<int>(first),
                            expert);
  } else {
    ptx::tma_load(to, map, full, depth, row, expert);
  }
}

// kColumns columns of 64 k of an MN-major operand. Shared: every other block of 64, to both CTAs.
template <int kColumns, bool kShared>
__device__ void load_mn_major(const CUtensorMap* map, uint32_t to, uint32_t full, uint32_t rank,
                              int depth, int column, int expert) {
  for (int block = kShared ? rank : 0; block < kColumns / 64; block += kShared ? 2 : 1) {
    const uint32_t at = to + block * tile::kBlockBytes;
    if constexpr (kShared) {
      ptx::tma_load_multicast(at, map, full, 0b11, column + block * 64, depth, expert);
    } else {
      ptx::tma_load(at, map, full, column + block * 64, depth, expert);
    }
  }
}

// One thread.
template <class S>
__device__ void load_role(const Params& p, const SharedLayout& l, uint32_t rank, Range r) {
  constexpr Shape shape = S::shape;
  constexpr bool shared_a = shape.pair == Pair::kSharedA, shared_b = shape.pair == Pair::kSharedB;
  ptx::prefetch_tensormap(&p.a);
  ptx::prefetch_tensormap(&p.b);
  tile::RingState<S::stages> ring;
  const auto wait_empty = [&] {
    tile::wait<S::cluster == 2>(l.empty + 8 * ring.stage, ring.parity ^ 1, Role::kLoader,
                                Slot::kEmpty, ring.stage);
  };
  for (int index = r.first; index < r.end; index += r.step) {
    const Item t = item_at<S>(p, index, rank);
    for (int k = 0; k < p.k_tiles; ++k) {
      wait_empty();
      const uint32_t full = l.full + 8 * ring.stage;
      const uint32_t a = l.ring + ring.stage * S::stage_bytes, b = a + S::a_bytes;
      ptx::mbarrier_arrive_expect_tx(full, S::stage_bytes);
      load_k_major<shape.block_m, shared_a>(&p.a, a, full, rank, k * 64, t.row, t.expert);
      if constexpr (shape.b == Major::kK) {
        load_k_major<shape.block_n, shared_b>(&p.b, b, full, rank, k * 64, t.column, t.expert);
      } else {
        load_mn_major<shape.block_n, shared_b>(&p.b, b, full, rank, k * 64, t.column, t.expert);
      }
      ring.advance();
    }
  }
  // Until all has been read: this wait reports a math warp that hangs (wait_quietly).
  for (int s = 0; s < S::stages; ++s) {
    wait_empty();
    ring.advance();
  }
}

// -------------------------------------------------------------------------------------------- math

// Without a limit: with tile::wait's trap among 192 sums ptxas spills them and serialises the wgmma
// (C7512). The loader's waits have the limit, and whatever hangs here keeps a stage from it.
__device__ __forceinline__ void wait_quietly(uint32_t barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait(barrier, parity)) {
  }
}

// Passes over `count` stages that the other warpgroup reads.
template <int kStages>
__device__ void skip(tile::RingState<kStages>& ring, int count) {
  const uint32_t at = ring.stage + static_cast<uint32_t>(count);
  ring.stage = at % kStages;
  ring.parity ^= at / kStages & 1;
}

// Pingpong: warpgroup w may begin its next tile once the other has issued the products of the tile
// before. That leaves the tensor cores to one tile at a time, and the ring depends on it: parity
// tells whether pass n of full[s] is complete only to one who knows that pass n-1 is (if pass n-2
// is the last complete one, its parity is that of n). Pass n-1 may belong to the other warpgroup,
// and this one, back from its stores while the loader is late, would take the stage a whole tile
// too early. Here every stage before the tile has been seen full, by this warpgroup or by the other
// before it arrived. Nor can pass n+1 complete and hide pass n: it waits for this warpgroup's
// release of n. order[w] itself is at most one phase ahead of its waiter: the other's next arrival
// follows this warpgroup's next tile.
class Order {
 public:
  __device__ Order(const SharedLayout& l, int w)
      : mine_(l.order + 8 * w), other_(l.order + 8 * (w ^ 1)), parity_(w ^ 1) {}
  // A fresh barrier lets warpgroup 0 begin (parity 1).
  __device__ void wait() {
    wait_quietly(mine_, parity_);
    parity_ ^= 1;
  }
  __device__ void arrive(int lane) const {
    if (lane == 0) ptx::mbarrier_arrive(other_);
  }

 private:
  uint32_t mine_, other_, parity_;
};

template <class S>
__device__ void release_stage(const SharedLayout& l, uint32_t stage, int lane) {
  if constexpr (S::cluster == 1) {
    if (lane == 0) ptx::mbarrier_arrive(l.empty + 8 * stage);
  } else {
    if (lane < 2) ptx::mbarrier_arrive_cluster_relaxed(l.empty + 8 * stage, lane);
  }
}

template <class S>
using Sums = float[S::m_blocks][S::shape.block_n / 2];

template <class S>
__device__ void fence_sums(Sums<S>& acc) {
#pragma unroll
  for (int m = 0; m < S::m_blocks; ++m) ptx::fence_accumulators(acc[m]);
}

// The products of one stage, issued as one group.
template <class S>
__device__ void multiply_stage(Sums<S>& acc, uint64_t a, uint64_t b, bool accumulate) {
  constexpr Major kB = S::shape.b;
  fence_sums<S>(acc);
  ptx::wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
#pragma unroll
    for (int m = 0; m < S::m_blocks; ++m) {
      const uint32_t a_offset = m * tile::kBlockBytes + kk * tile::k16_bytes(Major::kK);
      ptx::Wgmma<S::shape.block_n, Major::kK, kB>::mma(
          acc[m], tile::advance_descriptor(a, a_offset),
          tile::advance_descriptor(b, kk * tile::k16_bytes(kB)), accumulate || kk != 0);
    }
  }
  ptx::wgmma_commit_group();
  fence_sums<S>(acc);
}

// A warp's block of 16 x 64 sums, rounded to bf16, into its slot.
template <int kCount>
__device__ void dump_block(const float (&acc)[kCount], int first, uint32_t slot, int lane) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {  // 16 columns each
    const int i = first + 8 * j;
    ptx::stmatrix_x4(slot + tile::chunk_offset(lane & 15, 2 * j + (lane >> 4)),
                     ptx::pack_bf16x2(acc[i], acc[i + 1]), ptx::pack_bf16x2(acc[i + 2], acc[i + 3]),
                     ptx::pack_bf16x2(acc[i + 4], acc[i + 5]),
                     ptx::pack_bf16x2(acc[i + 6], acc[i + 7]));
  }
}

// The block of `slot` to D by 16-byte stores, four rows at a time.
__device__ inline void store_vectors(const Params& p, uint32_t slot, const Item& block, int lane) {
  const int row = lane / 8, chunk = lane & 7;
  uint4 v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[i] = ptx::load_shared_v4(slot + tile::chunk_offset(4 * i + row, chunk));
  }
  const int64_t first = int64_t{block.expert} * p.m + block.row + row;
  bf16* out = p.d + first * p.n + block.column + 8 * chunk;
#pragma unroll
  for (int i = 0; i < 4; ++i) ptx::store_global_v4(out + int64_t{4 * i} * p.n, v[i]);
}

// A warp's rows of the tile, block by block; `corner` is its first block. Needs no other warp.
template <class S>
__device__ void store_sums(const Params& p, const Sums<S>& acc, uint32_t dump, const Item& corner,
                           int lane) {
  constexpr bool tensor = S::shape.store == Store::kTensor;
#pragma unroll
  for (int i = 0; i < S::m_blocks * S::n_blocks; ++i) {
    const int m = i / S::n_blocks, n = i % S::n_blocks;
    const uint32_t slot = dump + i % S::slots * kSlotBytes;
    const Item block = {corner.expert, corner.row + 64 * m, corner.column + 64 * n};
    const bool inside = block.row < p.m && block.column < p.n;
    if constexpr (tensor) {
      ptx::bulk_wait_group_read<S::slots - 1>();  // the slot's last block has left it
      __syncwarp();
    }
    dump_block(acc[m], 32 * n, slot, lane);
    if constexpr (tensor) ptx::fence_proxy_async_shared();
    // Vectors: also keeps this block's writes behind the reads of the slot's last block, at least
    // two blocks ago.
    __syncwarp();
    if constexpr (tensor) {
      if (inside && ptx::elect_one()) {
        ptx::tma_store(&p.d_map, slot, block.column, block.row, block.expert);
      }
      ptx::bulk_commit_group();
    } else {
      if (inside) store_vectors(p, slot, block, lane);
    }
  }
}

template <class S>
__device__ void math_role(const Params& p, const SharedLayout& l, uint32_t rank, int warp, int lane,
                          Range r) {
  const int w = warp / 4;
  const int first_row = (S::pingpong ? 0 : w * S::m_blocks * 64) + (warp & 3) * 16;
  const uint32_t a_half = S::pingpong ? 0 : w * S::m_blocks * tile::kBlockBytes;
  const uint64_t a0 = tile::make_descriptor(l.ring + a_half, Major::kK);
  const uint64_t b0 = tile::make_descriptor(l.ring + S::a_bytes, S::shape.b);
  tile::RingState<S::stages> ring;
  Order order(l, w);
  Range own = r;
  if constexpr (S::pingpong) {
    own = {r.first + w * r.step, 2 * r.step, r.end};
    skip(ring, w * p.k_tiles);
  }
  Sums<S> acc;
  for (int index = own.first; index < own.end; index += own.step) {
    if constexpr (S::pingpong) order.wait();
    uint32_t previous = 0;
    for (int k = 0; k < p.k_tiles; ++k) {
      wait_quietly(l.full + 8 * ring.stage, ring.parity);
      const uint32_t offset = ring.stage * S::stage_bytes;
      multiply_stage<S>(acc, tile::advance_descriptor(a0, offset),
                        tile::advance_descriptor(b0, offset), k != 0);
      ptx::wgmma_wait_group<1>();
      if (k > 0) release_stage<S>(l, previous, lane);
      previous = ring.stage;
      ring.advance();
    }
    // The last k-tile still runs: the other warpgroup's first products queue up behind it.
    if constexpr (S::pingpong) order.arrive(lane);
    ptx::wgmma_wait_group<0>();
    fence_sums<S>(acc);
    release_stage<S>(l, previous, lane);
    if constexpr (S::pingpong) skip(ring, p.k_tiles);
    Item corner = item_at<S>(p, index, rank);
    corner.row += first_row;
    store_sums<S>(p, acc, l.dump + warp * S::slots * kSlotBytes, corner, lane);
  }
  ptx::bulk_wait_group<0>();
}

// ------------------------------------------------------------------------------------------ kernel

template <class S>
__device__ void init_barriers(const SharedLayout& l) {
  for (int s = 0; s < S::stages; ++s) {
    ptx::mbarrier_init(l.full + 8 * s, 1);
    ptx::mbarrier_init(l.empty + 8 * s, (S::pingpong ? 4 : 8) * S::cluster);
  }
  for (int w = 0; w < 2; ++w) ptx::mbarrier_init(l.order + 8 * w, 4);
  ptx::fence_mbarrier_init();
}

template <class S>
__device__ void sync_cluster() {
  if constexpr (S::cluster == 1) {
    __syncthreads();
  } else {
    __syncwarp();
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

template <class S>
__global__ void __launch_bounds__(S::threads, 1) gemm_kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const SharedLayout l = shared_layout<S>(ptx::shared_address(shared));
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const uint32_t rank = S::cluster == 1 ? 0 : ptx::cluster_rank();
  if (threadIdx.x == 0) {
    if ((ptx::shared_address(shared) & 1023) != 0) __trap();
    init_barriers<S>(l);
    p.cycles[blockIdx.x] = clock64();  // the start, which no register is left to keep
  }
  sync_cluster<S>();
  const Range r = {static_cast<int>(blockIdx.x) / S::cluster,
                   static_cast<int>(gridDim.x) / S::cluster, p.experts * p.m_items * p.n_items};
  if (warp >= 8) {
    ptx::setmaxnreg_decrease<kHelperRegisters>();
    if (warp == 8 && lane == 0) load_role<S>(p, l, rank, r);
  } else {
    ptx::setmaxnreg_increase<kMathRegisters>();
    math_role<S>(p, l, rank, warp, lane, r);
    // The warpgroup that has the CTA's last tile tells the time.
    const int tiles = r.first < r.end ? (r.end - 1 - r.first) / r.step + 1 : 1;
    const int last = S::pingpong ? (tiles - 1) % 2 : 0;
    if (threadIdx.x == last * 128) p.cycles[blockIdx.x] = clock64() - p.cycles[blockIdx.x];
  }
  if constexpr (S::cluster == 2) sync_cluster<S>();  // the peer may still multicast or arrive here
}

// -------------------------------------------------------------------------------------------- host

struct Variant {
  std::string name;
  Shape shape;
  void (*kernel)(Params);
  int shared_bytes, cluster;
};

template <Shape kShape>
Variant make_variant() {
  using S = Spec<kShape>;
  CHECK_CUDA(cudaFuncSetAttribute(gemm_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  S::shared_bytes));
  const char* pairs[] = {"", ", pair shares A", ", pair shares B"};
  return {format("%s %dx%d, %d stages%s, %s", S::pingpong ? "pingpong" : "cooperative",
                 kShape.block_m, kShape.block_n, S::stages, pairs[static_cast<int>(kShape.pair)],
                 kShape.store == Store::kTensor ? "tensor stores" : "vector stores"),
          kShape, gemm_kernel<S>, S::shared_bytes, S::cluster};
}

// M a multiple of 16 and N one of 64: a warp's block is then inside or outside as a whole.
inline Params make_params(const BmmProblem& problem, const Variant& v, uint64_t* cycles) {
  const BmmSize& s = problem.size;
  const uint64_t m = s.m, n = s.n, k = s.k, e = s.experts;
  const Shape& shape = v.shape;
  const int a_sharers = shape.pair == Pair::kSharedA ? 2 : 1;
  const int b_sharers = shape.pair == Pair::kSharedB ? 2 : 1;
  const uint32_t a_rows = shape.block_m / a_sharers, b_rows = shape.block_n / b_sharers;
  const auto count = [](int size, int part) { return (size + part - 1) / part; };
  Params p = {};
  p.a = make_tensor_map(problem.a.data(), {k, m, e}, {64, a_rows, 1});
  p.b = shape.b == Major::kK ? make_tensor_map(problem.b.data(), {k, n, e}, {64, b_rows, 1})
                             : make_tensor_map(problem.b.data(), {n, k, e}, {64, 64, 1});
  p.d_map = make_tensor_map(problem.d.data(), {n, m, e}, {64, 16, 1});
  p.d = problem.d.data();
  p.cycles = cycles;
  p.experts = s.experts;
  p.m = s.m;
  p.n = s.n;
  p.m_items = count(s.m, shape.block_m * b_sharers);
  p.n_items = count(s.n, shape.block_n * a_sharers);
  p.k_tiles = count(s.k, 64);
  return p;
}

inline void launch(const Variant& v, const Params& p) {
  launch_clusters(v.kernel, v.shared_bytes, v.cluster, p);
}

}  // namespace experiment::pingpong
