// What the roles of the grouped GEMM share: its shape, its parameters, a tile of its work, and how
// shared memory is divided. The kernel is in grouped_gemm.cuh. Plain C++ but for CUDA's types.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "cuda/element.hpp"
#include "cuda/ptx/major.hpp"
#include "cuda/sorted_rows.hpp"
#include "math/host_device.hpp"

namespace sonicmoe::cuda::hopper {

using ptx::Major;

enum class Grouping { kRows, kDepth };

// How accumulators leave the math warps: rounded to bf16 through the dump tile, as stored or
// transposed, or in float32 straight to global memory.
enum class Dump { kRows, kTransposed, kDirect };

struct GemmShape {
  Grouping grouping = Grouping::kRows;
  int block_n = 256;
  Major a = Major::kK;
  Major b = Major::kK;
  bool gather = true;  // A by cp.async, row by row; else by TMA
  Dump dump = Dump::kRows;
  int loader_warps = 1;  // of the helper warpgroup; the others are epilogue warps (kDirect: none)
  int extra_bytes = 0;   // shared memory of the epilogue warps' own, behind the dump tile

  SONICMOE_HD constexpr int epilogue_warps() const {
    return dump == Dump::kDirect ? 0 : 4 - loader_warps;
  }
  // The dump tile leaves by TMA: stores of 16 bytes would compete with the gather for the
  // load-store unit.
  SONICMOE_HD constexpr bool dump_by_tma() const {
    return grouping == Grouping::kDepth && dump != Dump::kDirect;
  }
  // A math thread issues that, where all helper warps load.
  SONICMOE_HD constexpr bool bulk_stores() const { return dump_by_tma() && epilogue_warps() == 0; }
  // The first loader warp issues TMA; in kDepth that is all it does.
  SONICMOE_HD constexpr int gather_warps() const {
    return !gather ? 0 : grouping == Grouping::kRows ? loader_warps : loader_warps - 1;
  }
};

inline constexpr int kThreads = 384;
inline constexpr int kBlockM = 128;
inline constexpr int kBlockK = 128 / kElementBytes;  // a row of the 128-byte swizzle
static_assert(kBlockK == kSortedStep);
inline constexpr int kMathWarps = 8, kHalfWarps = 4;  // of the tile, of a half of it
inline constexpr int kLoaderWarp = kMathWarps;
inline constexpr int kMostStages = 6;
inline constexpr int kItemSlots = 4;
// 2 * math + helper = 504 = 3 * 168, exactly what 384 threads are launched with; a larger sum
// hangs.
inline constexpr int kMathRegisters = 184;
inline constexpr int kHelperRegisters = 136;
static_assert(2 * kMathRegisters + kHelperRegisters == 504);

// The start of shared memory. A barrier has 8 bytes.
struct Barriers {
  std::uint64_t full[8], empty[8];            // of the stages
  std::uint64_t dump_full[2], dump_empty[2];  // of the halves of the dump tile
  alignas(64) std::uint64_t item_full[kItemSlots];
  alignas(64) std::uint64_t item_empty[kItemSlots];
  alignas(64) std::uint64_t items[kItemSlots][2];  // not barriers: the items themselves
  std::uint64_t extra[80];                         // the epilogue warps' own
};
static_assert(kMostStages <= 8 && sizeof(Barriers) == 1024, "operand tiles start at atoms");

// Arrivals that complete a phase of each barrier.
struct Arrivals {
  int full, empty, dump_full, dump_empty, item_full, item_empty;
};
SONICMOE_HD constexpr Arrivals arrivals(GemmShape s) {
  return {.full = 1 + 32 * s.gather_warps(),  // expect_tx, and every gathering lane's copies
          .empty = kMathWarps,
          .dump_full = kHalfWarps,
          .dump_empty = s.epilogue_warps(),
          .item_full = 1,  // the first loader warp
          .item_empty = kMathWarps + s.loader_warps - 1 + s.epilogue_warps()};  // all the others
}

// __syncthreads() among some of the warps: the four of a half, where they store it themselves.
enum class NamedBarrier : int { kFirstHalf = 1, kSecondHalf = 2 };
SONICMOE_HD constexpr int barrier_of_half(int w) {
  return static_cast<int>(NamedBarrier::kFirstHalf) + w;
}

inline constexpr int kSharedLimit = 232448;
inline constexpr int kBarrierBytes = sizeof(Barriers);
inline constexpr int kStageABytes = kBlockM * kBlockK * kElementBytes;

SONICMOE_HD constexpr int stage_bytes(GemmShape s) {
  return kStageABytes + s.block_n * kBlockK * kElementBytes;
}
SONICMOE_HD constexpr int half_dump_bytes(GemmShape s) {
  return s.dump == Dump::kDirect ? 0 : 64 * s.block_n * kElementBytes;
}
SONICMOE_HD constexpr int stage_count(GemmShape s) {
  const int rest = kSharedLimit - kBarrierBytes - 2 * half_dump_bytes(s) - s.extra_bytes;
  const int fit = rest / stage_bytes(s);
  return fit < kMostStages ? fit : kMostStages;
}
SONICMOE_HD constexpr int shared_bytes(GemmShape s) {
  return kBarrierBytes + stage_count(s) * stage_bytes(s) + 2 * half_dump_bytes(s) + s.extra_bytes;
}

// Addresses in the shared::cta window: Barriers, the ring of stages, the dump tile, extra_bytes.
struct SharedLayout {
  std::uint32_t full, empty, dump_full, dump_empty, item_full, item_empty, items;
  std::uint32_t ring, dump, extra, extra_barriers;
};

SONICMOE_HD SharedLayout shared_layout(GemmShape s, std::uint32_t base) {
  SharedLayout l;
  l.full = base;
  l.empty = base + offsetof(Barriers, empty);
  l.dump_full = base + offsetof(Barriers, dump_full);
  l.dump_empty = base + offsetof(Barriers, dump_empty);
  l.item_full = base + offsetof(Barriers, item_full);
  l.item_empty = base + offsetof(Barriers, item_empty);
  l.items = base + offsetof(Barriers, items);
  l.extra_barriers = base + offsetof(Barriers, extra);
  l.ring = base + kBarrierBytes;
  l.dump = l.ring + stage_count(s) * stage_bytes(s);
  l.extra = l.dump + 2 * half_dump_bytes(s);
  return l;
}

SONICMOE_HD constexpr std::uint32_t a_of_stage(const SharedLayout& l, GemmShape s,
                                               std::uint32_t stage) {
  return l.ring + stage * stage_bytes(s);
}
SONICMOE_HD constexpr std::uint32_t b_of_stage(const SharedLayout& l, GemmShape s,
                                               std::uint32_t stage) {
  return a_of_stage(l, s, stage) + kStageABytes;
}

// What loader and math need, whatever the epilogue.
struct OperandParams {
  CUtensorMap a;  // A by TMA. kRows: [P, depth], boxes of 64 rows x 64; kDepth: the sorted rows
  CUtensorMap b;  // kRows: weights; kDepth: [P, N]

  const bf16* gathered;           // X or dO [T, depth of d]
  std::uint32_t gathered_ld;      // elements, a multiple of 8
  const std::int32_t* row_token;  // [P] or null: row r is token r

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
  bool early_release;     // hand a stage back before the next has come (mainloop/math.cuh)
  std::uint32_t* claims;  // tile counters (mainloop/schedule.cuh), or null: strided
  int start_patience;     // clocks that a CTA waits for the others before a tile; 0: it does not
  int m_tiles;            // kDepth: ceil(d / 128); else 1
  int n_tiles;
  int n_group;       // column tiles that all rows pass before the next ones
  int row_block;     // tile rows of an expert that pass its columns together (tile_order.hpp)
  int depth;         // kRows: length of the reduction; kDepth: d, the columns of the gathered side
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

// One tile of the product.
struct Item {
  int row0, rows, expert;  // of the table entry
  int m;                   // kDepth: tile along d
  int n;                   // tile along the columns
  int k_tiles;
};

}  // namespace sonicmoe::cuda::hopper
