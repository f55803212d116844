// One expert's column of keys and the radix selection over it, by a whole CTA.
#pragma once

#include <cstdint>

#include "cuda/router/scoring.cuh"

namespace sonicmoe::cuda::router {

inline constexpr int kSelectThreads = 1024;
inline constexpr int kSelectWarps = kSelectThreads / 32;
inline constexpr int kBatch = 8;  // words of 32 tokens in flight per warp

/// Tokens fall into two classes: those that chose the expert and the others.
enum class Class : bool { kChosen, kOther };

struct Column {
  const std::uint32_t* keys;    // [32 * words], 0 past the last token
  const std::uint32_t* chosen;  // [words] bit t: token choice gave t to the expert
  int words;
  std::int64_t num_tokens;

  __device__ std::uint32_t valid(int word) const {
    const std::int64_t left = num_tokens - std::int64_t{word} * 32;
    return left >= 32 ? 0xffffffffu : (1u << left) - 1;
  }
};

/// Keeps the keys above the threshold and the first `ties` of the `equal` ones that equal it.
struct Cut {
  std::uint32_t threshold = 0xffffffffu;  // no number has this key: keeps nothing
  int ties = 0;
  int equal = 0;
};

// Digits of 11 bits, from the top: three passes in place of the four of bytes. And the top one, a
// float's sign, exponent and two bits more, spreads scores over some fifty counters where the top
// byte has ten, on which the atomics of a warp would wait for each other.
inline constexpr int kDigitBits = 11;
inline constexpr int kDigits = 1 << kDigitBits;
static_assert(kDigits == 2 * kSelectThreads, "pick_digit gives a thread two");

struct SelectShared {
  unsigned histogram[kDigits];
  int warp_sums[kSelectWarps];
  int digit, left, equal;
};

// Calls visit(members, key, word) for the words [first, end) in steps of `step`; `members` says
// which of the warp's 32 tokens belong to the class. Loads a batch before the first use, since one
// word after the other would pay the L2 latency each time.
template <class Visit>
__device__ __forceinline__ void for_each_word(const Column& c, Class wanted, int first, int end,
                                              int step, int lane, Visit&& visit) {
  for (int w = first; w < end; w += kBatch * step) {
    std::uint32_t chosen[kBatch], keys[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int word = w + i * step;
      chosen[i] = word < end ? c.chosen[word] : 0;
      keys[i] = word < end ? c.keys[std::int64_t{word} * 32 + lane] : 0;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int word = w + i * step;
      if (word >= end) break;
      const std::uint32_t members =
          wanted == Class::kChosen ? chosen[i] : ~chosen[i] & c.valid(word);
      visit(members, keys[i], word);
    }
  }
}

// Which digit the count-th largest member has, and what is left to take among its equals. All
// threads; ends with a barrier.
__device__ inline void pick_digit(SelectShared& s, int left) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int digit = kDigits - 1 - 2 * static_cast<int>(threadIdx.x);  // and the one below
  const int upper = static_cast<int>(s.histogram[digit]);
  const int lower = static_cast<int>(s.histogram[digit - 1]);
  int inclusive = upper + lower;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, inclusive, distance);
    if (lane >= distance) inclusive += other;
  }
  if (lane == 31) s.warp_sums[warp] = inclusive;
  __syncthreads();
  const int warps_before = __reduce_add_sync(kAllLanes, lane < warp ? s.warp_sums[lane] : 0);
  const int before = warps_before + inclusive - upper - lower;
  if (before < left && left <= before + upper + lower) {  // one thread's
    const bool is_upper = left <= before + upper;
    s.digit = is_upper ? digit : digit - 1;
    s.left = left - before - (is_upper ? 0 : upper);
    s.equal = is_upper ? upper : lower;
  }
  __syncthreads();
}

// The cut that keeps the `count` largest members of a class, which has at least as many: a pass
// over the column per digit. All threads of the CTA, same arguments.
__device__ inline Cut find_cut(const Column& c, Class wanted, int count, SelectShared& s) {
  if (count == 0) return {};
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  std::uint32_t prefix = 0;  // digits decided so far
  int left = count;
  for (int bits = 32; bits > 0;) {  // not decided
    const int shift = max(bits - kDigitBits, 0);
    const std::uint32_t decided = bits == 32 ? 0u : 0xffffffffu << bits;
    const std::uint32_t digits = (1u << (bits - shift)) - 1;
    for (int d = threadIdx.x; d < kDigits; d += kSelectThreads) s.histogram[d] = 0;
    __syncthreads();
    for_each_word(c, wanted, warp, c.words, kSelectWarps, lane,
                  [&](std::uint32_t members, std::uint32_t key, int) {
                    if (((members >> lane) & 1u) != 0 && (key & decided) == prefix) {
                      atomicAdd(s.histogram + ((key >> shift) & digits), 1u);
                    }
                  });
    __syncthreads();
    pick_digit(s, left);
    prefix |= static_cast<std::uint32_t>(s.digit) << shift;
    left = s.left;
    bits = shift;
  }
  return {prefix, left, s.equal};
}

}  // namespace sonicmoe::cuda::router
