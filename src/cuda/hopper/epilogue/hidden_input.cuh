// What the epilogue of the backward reads besides the product: H and the row weights. The epilogue
// warps take H by TMA through shared memory of their own (their loads through L1 would queue behind
// the loader's gathers). The math warps, which need few rows, load them directly.
#pragma once

#include "cuda/hopper/epilogue/store.cuh"
#include "cuda/hopper/tile/pipeline.cuh"
#include "cuda/ptx/mbarrier.cuh"

namespace sonicmoe::cuda::hopper {

using tile::Role;
using tile::Slot;

// Where gate and up of one hidden unit j lie in a row of H.
enum class HiddenLayout : int {
  kPlain,         // no gate: [n]
  kConcatenated,  // [gate; up]: j and n + j; the tile's halves are gate and up
  kInterleaved,   // 2j and 2j + 1, in the tile too
};

// Which eight of every 64 hidden units lane `chunk` (of eight a row) takes: those from 8 chunk on.
// With kPairs, where gate and up alternate in H, the four from 4 chunk on and the four 32 further,
// so that one store of the eight lanes is 128 bytes of H in one piece; with runs of eight each
// store would write half of every sector.
template <bool kPairs>
struct LaneUnits {
  static constexpr int kRunLength = kPairs ? 4 : 8;
  // num_units: of the row, from the tile's first unit on; 0 for a row past the end.
  __device__ LaneUnits(int chunk, int num_units)
      : first(kRunLength * chunk), left(num_units - kRunLength * chunk) {}
  // Whether the run (0, or 1 with kPairs) of block `block` lies in the row: all of it, since n is a
  // multiple of 8.
  __device__ bool inside(int block, int run = 0) const { return 64 * block + 32 * run < left; }
  // From row `row` of the dump at `half`, block `block`.
  __device__ uint4 load(uint32_t half, int row, int block) const {
    const uint32_t at =
        half + tile::dump_offset(row, first / 8) + first % 8 * 2 + block * tile::kBlockBytes;
    if constexpr (!kPairs) return ptx::load_shared_v4(at);
    const uint2 low = ptx::load_shared_v2(at), high = ptx::load_shared_v2(at ^ 64);
    return {low.x, low.y, high.x, high.y};
  }
  // Run kRun of `v` to the row whose run 0 of the block lies at `to`.
  template <int kRun>
  __device__ void store(bf16* to, const uint4& v) const {
    if constexpr (!kPairs) return ptx::store_global_v4(to, v);
    ptx::store_global_v2(to + 32 * kRun, kRun == 0 ? v.x : v.z, kRun == 0 ? v.y : v.w);
  }
  int first, left;
};

// A lane's units of every block of 64: vectors of gate and up, or of the pairs of its two runs;
// without gate `first` alone.
template <int kBlocks, bool kGated>
struct HiddenVectors {
  uint4 first[kBlocks];
  uint4 second[kGated ? kBlocks : 1];
};

// One epilogue warp's ring. A slot is one box of H: a group of four rows x kUnits hidden units with
// gate and up. The warp fills its slots itself, in the order in which it takes them, so that one
// barrier a slot is enough: full, 1 expect_tx. Of every row group with at least one row both slots
// are filled and taken, also where they lie past column n: HalfRows::groups() alone says how many.
// Rows past the end of the tile arrive too (of other experts, or zeros); nothing computed from them
// is stored.
template <int kBlockN, bool kGated, int kWarps, bool kMathWarpsStore>
class HiddenInput {
 public:
  using Rows = HalfRows<kWarps, kMathWarpsStore>;
  static constexpr int kBatches = 2;                 // slots of a row group
  static constexpr int kUnits = kBlockN / kBatches;  // of a slot
  static constexpr int kBlocks = kUnits / 64;
  static constexpr int kRowBytes = (kGated ? 2 : 1) * kUnits * kElementBytes;
  static constexpr int kSlotBytes = 4 * kRowBytes;
  // What three stages of 256 columns leave to each of three warps.
  static constexpr int kSlots = 6144 / kSlotBytes;
  static constexpr int kBytes = kSlots * kSlotBytes;  // of shared memory, a warp
  static_assert(kSlotBytes % 128 == 0 && kWarps * kSlots * 8 <= int{sizeof(Barriers::extra)});
  static_assert(Rows::kGroups <= 8, "a lane holds one row's weight of a half");

  using Vectors = HiddenVectors<kBlocks, kGated>;  // one lane's share of a slot

  // Params: h_map (by map_of_hidden()), row_weight, layout.
  template <class Params>
  __device__ HiddenInput(const Params& p, const SharedLayout& l, int warp, int lane)
      : map_(&p.h_map),
        weights_(p.row_weight, 1.0f, warp, lane),
        slots_(l.extra + warp * kBytes),
        barriers_(l.extra_barriers + warp * kSlots * 8),
        warp_(warp),
        lane_(lane),
        interleaved_(p.layout == HiddenLayout::kInterleaved) {
    if (lane == 0) {
      ptx::prefetch_tensormap(map_);
      for (int s = 0; s < kSlots; ++s) ptx::mbarrier_init(barriers_ + 8 * s, 1);
      ptx::fence_mbarrier_init();
    }
    __syncwarp();  // nobody but this warp and its copies knows these barriers
  }

  // Announces half w of item t, after the one before has been announced and the one before that
  // taken to its end. Its first loads start as soon as slots are free.
  __device__ void begin(const Item& t, int w) {
    const Rows rows(t, w, warp_, lane_);
    next_ = {.row0 = rows.row0,
             .group = 0,
             .column = t.n * kBlockN * (interleaved_ ? 2 : 1),
             .slots = kBatches * rows.groups()};
    weights_.begin(t, w);
    fill();
  }

  // The weight of this lane's row in row group i of half w. All lanes.
  __device__ float weight(int w, int i) const { return weights_.of(w, i); }

  // Waits for the next slot, copies this lane's vectors of it to registers and hands it back. All
  // lanes.
  __device__ void take(Vectors& to) {
    tile::wait(barriers_ + 8 * ring_.stage, ring_.parity, Role::kEpilogue, Slot::kHidden,
               ring_.stage);
    const int scale = interleaved_ ? 2 : 1, second = interleaved_ ? 128 : kUnits * kElementBytes;
    const uint32_t from =
        slots_ + ring_.stage * kSlotBytes + lane_ / 8 * kRowBytes + (lane_ & 7) * 16;
    uint32_t last = 0;  // of each load one register: the four of a load come together
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      to.first[b] = ptx::load_shared_v4(from + b * 128 * scale);
      last ^= to.first[b].x;
      if constexpr (kGated) {
        to.second[b] = ptx::load_shared_v4(from + b * 128 * scale + second);
        last ^= to.second[b].x;
      }
    }
    // The copy over this slot takes another way than the loads, which may stand in a queue behind
    // gathers that miss: that they were issued first is not enough. A proxy fence here would, as
    // compiled, also wait for the stores of the batch before (MEMBAR).
    ptx::await_value(last);
    __syncwarp();
    ring_.advance();
    --filled_;
    fill();
  }

 private:
  // The slots of a half that are still to be filled.
  struct Cursor {
    int row0, group, column;  // of the next boxes in the map
    int slots;
  };

  // Starts loads until the ring is full or the announced halves are exhausted.
  __device__ void fill() {
    while (filled_ < kSlots) {
      if (now_.slots == 0) {
        now_ = next_;
        next_.slots = 0;
        if (now_.slots == 0) return;
      }
      const int batch = now_.slots % kBatches;  // 0 first: the number of slots is even
      if (lane_ == 0) {
        const uint32_t barrier = barriers_ + 8 * fill_stage_;
        ptx::mbarrier_arrive_expect_tx(barrier, kSlotBytes);
        ptx::tma_load(slots_ + fill_stage_ * kSlotBytes, map_, barrier,
                      now_.column + batch * kUnits * (interleaved_ ? 2 : 1), 0,
                      now_.row0 + 4 * Rows::group(warp_, now_.group));
      }
      __syncwarp();
      if (batch == kBatches - 1) ++now_.group;
      --now_.slots;
      if (++fill_stage_ == kSlots) fill_stage_ = 0;
      ++filled_;
    }
  }

  const CUtensorMap* map_;
  RowValues<float, Rows> weights_;
  uint32_t slots_, barriers_;
  int warp_, lane_;
  bool interleaved_;
  Cursor now_{}, next_{};
  tile::RingState<kSlots> ring_;  // the slot to take next
  uint32_t fill_stage_ = 0;       // the slot to fill next
  int filled_ = 0;                // slots filled and not yet taken
};

// The same for a math warp's own four rows, by plain loads when it is made.
template <int kBlockN, bool kGated>
class MathWarpHiddenInput {
 public:
  using Rows = MathWarpRows;
  static constexpr int kBatches = 1;
  static constexpr int kBlocks = kBlockN / 64;
  using Vectors = HiddenVectors<kBlocks, kGated>;

  // Params: h, n, row_weight, layout.
  template <class Params>
  __device__ MathWarpHiddenInput(const Params& p, const Item& t, int w, int warp, int lane) {
    const Rows rows(t, w, warp, lane);
    // Nothing computed from rows and units past the end is stored: any will do.
    const int64_t row = rows.row0 + min(rows.row(0), rows.rows - 1);
    weight_ = p.row_weight == nullptr ? 1.0f : __ldg(p.row_weight + row);
    const bool interleaved = p.layout == HiddenLayout::kInterleaved;
    const int scale = interleaved ? 2 : 1, last = scale * p.n - 8;
    const bf16* from = p.h + row * (kGated ? 2 : 1) * p.n;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const int first = scale * (t.n * kBlockN + block * 64) + (lane & 7) * 8;
      const int second = interleaved ? min(first + 64, last) : p.n + min(first, last);
      h_.first[block] = ptx::load_global_nc_v4(from + min(first, last));
      if constexpr (kGated) h_.second[block] = ptx::load_global_nc_v4(from + second);
    }
  }

  __device__ float weight(int, int) const { return weight_; }
  __device__ void take(Vectors& to) const { to = h_; }

 private:
  float weight_;
  Vectors h_;
};

}  // namespace sonicmoe::cuda::hopper
