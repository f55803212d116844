// A class of an expert's tokens and the cut that keeps the largest of their keys, by a whole CTA.
#pragma once

#include <cstdint>

#include "cuda/router/scoring.cuh"

namespace sonicmoe::cuda::router {

inline constexpr int kSelectThreads = 1024;
inline constexpr int kSelectWarps = kSelectThreads / 32;
inline constexpr int kBatch = 4;  // words of 32 tokens that a warp takes at once
inline constexpr int kGathered = 4 * kSelectThreads;  // keys that fit in shared memory
static_assert(kSelectWarps == 32, "a warp reduces what the warps have stored, one per lane");

/// Tokens fall into two classes: those that chose the expert and the others.
enum class Class : bool { kChosen, kOther };

struct Column {
  const std::uint32_t* keys;    // [32 * words], 0 past the last token
  const std::uint32_t* chosen;  // [words] bit t: token choice gave t to the expert
  int words;
};

/// The keys of a class. Every warp has a contiguous range of words; its first kHeld stay in
/// registers (all up to T = 1024 kHeld), those beyond are read again in every pass.
template <int kHeld>
class Members {
  static_assert(kHeld <= 32 && kHeld % kBatch == 0);

 public:
  __device__ Members(const Column& column, Class wanted)
      : column_(column), others_(wanted == Class::kOther ? 0xffffffffu : 0u) {
    const int batches = (column.words + kSelectWarps * kBatch - 1) / (kSelectWarps * kBatch);
    const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 32, 0);
    first_ = warp * batches * kBatch;  // known to be the same in all lanes
    end_ = min(first_ + batches * kBatch, column.words);
    load(first_, held_);
  }

  /// Calls visit(key, word) with the lane's key in every word of the warp, 0 for a token outside
  /// the class; no number has that key. The last words of a batch may lie past the column.
  template <class Visit>
  __device__ __forceinline__ void for_each(Visit&& visit) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i % kBatch == 0 && first_ + i >= end_) return;
      visit(held_[i], first_ + i);
    }
    for (int word = first_ + kHeld; word < end_; word += kBatch) {
      std::uint32_t keys[kBatch];
      load(word, keys);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) visit(keys[i], word + i);
    }
  }

 private:
  // Loads nothing for tokens outside the class: where few have chosen, that is most of a column.
  template <int kCount>
  __device__ __forceinline__ void load(int word, std::uint32_t (&keys)[kCount]) const {
    const int lane = threadIdx.x % 32;
    const int mine = word + lane;
    const std::uint32_t members =
        lane < kCount && mine < end_ ? column_.chosen[mine] ^ others_ : 0u;
    const std::uint32_t* from = column_.keys + std::int64_t{word} * 32 + lane;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool is_member = ((__shfl_sync(kAllLanes, members, i) >> lane) & 1u) != 0;
      keys[i] = is_member ? from[32 * i] : 0u;
    }
  }

  Column column_;
  std::uint32_t others_;  // turns chosen bits into those of the class
  int first_, end_;
  std::uint32_t held_[kHeld];
};

/// Keeps the keys from `sure` up, and the first `ties` of the `equal` keys `tied` just below it.
struct Cut {
  std::uint32_t sure = 0xffffffffu;  // no number has this key: keeps nothing
  std::uint32_t tied = 0;            // no member has this one
  int ties = 0;
  int equal = 0;
};

struct SelectShared {
  std::uint32_t of_warps[2][kSelectWarps];  // in turns, so that a reduction has one barrier
  std::uint32_t keys[kGathered];
  int num_keys;
};

// Over all threads. Calls in a row take of_warps in turns.
__device__ inline int cta_sum(int value, std::uint32_t* of_warps) {
  const int lane = threadIdx.x % 32;
  const int sum = __reduce_add_sync(kAllLanes, value);
  if (lane == 0) of_warps[threadIdx.x / 32] = static_cast<std::uint32_t>(sum);
  __syncthreads();
  return __reduce_add_sync(kAllLanes, static_cast<int>(of_warps[lane]));
}
__device__ inline std::uint32_t cta_max(std::uint32_t value, std::uint32_t* of_warps) {
  const int lane = threadIdx.x % 32;
  const std::uint32_t largest = __reduce_max_sync(kAllLanes, value);
  if (lane == 0) of_warps[threadIdx.x / 32] = largest;
  __syncthreads();
  return __reduce_max_sync(kAllLanes, of_warps[lane]);
}

// The sum of the values of the lanes up to this one.
template <class T>
__device__ T inclusive_sum(T value, int lane) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const T other = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += other;
  }
  return value;
}

// Brings the keys low..high-1 to s.keys, in any order; s.num_keys is 0 before. Ends with a barrier.
template <int kHeld>
__device__ void gather(const Members<kHeld>& members, std::uint32_t low, std::uint32_t high,
                       SelectShared& s) {
  const int lane = threadIdx.x % 32;
  int mine = 0;
  members.for_each([&](std::uint32_t key, int) { mine += key - low < high - low ? 1 : 0; });
  const int end = inclusive_sum(mine, lane);
  const int base = lane == 31 ? atomicAdd(&s.num_keys, end) : 0;
  std::uint32_t* place = s.keys + __shfl_sync(kAllLanes, base, 31) + end - mine;
  members.for_each([&](std::uint32_t key, int) {
    if (key - low < high - low) *place++ = key;
  });
  __syncthreads();
}

/// Holds the count-th largest key: above < count <= at_least.
struct KeyRange {
  std::uint32_t low, high;  // keys low..high-1
  int at_least, above;      // members that reach low, and high

  __device__ bool is_cut(int count) const { return at_least == count || high - low == 1; }
  __device__ std::uint32_t middle() const { return low + (high - low) / 2; }
  // Takes the half with the count-th, given how many members reach the middle.
  __device__ void halve(int reaching, int count) {
    const bool is_upper = reaching >= count;
    const std::uint32_t at = middle();
    (is_upper ? low : high) = at;
    (is_upper ? at_least : above) = reaching;
  }
};

/// The cut that keeps the `count` largest keys of a class of `size` >= count. Bisects the range of
/// the keys until its lower end makes the cut or it is one key: over all members while more than
/// kGathered lie in it, then over those alone. All threads, same arguments; a barrier between
/// calls.
template <int kHeld>
__device__ Cut find_cut(const Members<kHeld>& members, int size, int count, SelectShared& s) {
  if (count == 0) return {};
  if (threadIdx.x == 0) s.num_keys = 0;
  std::uint32_t largest = 0, negative = 0;  // negative: orders downwards, and keeps 0 lowest
  members.for_each([&](std::uint32_t key, int) {
    largest = max(largest, key);
    negative = max(negative, 0u - key);
  });
  const std::uint32_t end = cta_max(largest, s.of_warps[0]) + 1;
  KeyRange range{0u - cta_max(negative, s.of_warps[1]), end, size, 0};
  int turn = 0;
  for (; !range.is_cut(count) && range.at_least - range.above > kGathered; turn ^= 1) {
    const std::uint32_t middle = range.middle();
    int reaching = 0;
    members.for_each([&](std::uint32_t key, int) { reaching += key >= middle ? 1 : 0; });
    range.halve(cta_sum(reaching, s.of_warps[turn]), count);
  }
  if (!range.is_cut(count)) {
    gather(members, range.low, range.high, s);
    const int num_keys = range.at_least - range.above, above = range.above;
    for (; !range.is_cut(count); turn ^= 1) {
      const std::uint32_t middle = range.middle();
      int reaching = 0;
      for (int i = threadIdx.x; i < num_keys; i += kSelectThreads) {
        reaching += s.keys[i] >= middle ? 1 : 0;
      }
      range.halve(above + cta_sum(reaching, s.of_warps[turn]), count);
    }
  }
  if (range.at_least == count) return {range.low};
  return {range.high, range.low, count - range.above, range.at_least - range.above};
}

}  // namespace sonicmoe::cuda::router
