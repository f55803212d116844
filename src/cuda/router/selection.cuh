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

struct SelectShared {
  unsigned histogram[256];
  int byte, left, equal;
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

// Which byte the count-th largest member falls into, and what is left to take inside it. Warp 0.
__device__ inline void pick_byte(SelectShared& s, int left, int lane) {
  unsigned bins[8];  // of bytes 255 - 8 lane, downwards
  int sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    bins[i] = s.histogram[255 - 8 * lane - i];
    sum += static_cast<int>(bins[i]);
  }
  int inclusive = sum;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, inclusive, distance);
    if (lane >= distance) inclusive += other;
  }
  int before = inclusive - sum;
  if (before >= left || inclusive < left) return;  // another lane's
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int count = static_cast<int>(bins[i]);
    if (before < left && before + count >= left) {
      s.byte = 255 - 8 * lane - i;
      s.left = left - before;
      s.equal = count;
    }
    before += count;
  }
}

// The cut that keeps the `count` largest members of a class, which has at least as many: four
// passes over the column, from the top byte down. All threads of the CTA, same arguments.
__device__ inline Cut find_cut(const Column& c, Class wanted, int count, SelectShared& s) {
  if (count == 0) return {};
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  std::uint32_t prefix = 0;  // bytes decided so far
  int left = count;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int b = threadIdx.x; b < 256; b += blockDim.x) s.histogram[b] = 0;
    __syncthreads();
    const std::uint32_t decided = shift == 24 ? 0u : 0xffffffffu << (shift + 8);
    for_each_word(c, wanted, warp, c.words, kSelectWarps, lane,
                  [&](std::uint32_t members, std::uint32_t key, int) {
                    if (((members >> lane) & 1u) != 0 && (key & decided) == prefix) {
                      atomicAdd(s.histogram + ((key >> shift) & 0xffu), 1u);
                    }
                  });
    __syncthreads();
    if (warp == 0) pick_byte(s, left, lane);
    __syncthreads();
    prefix |= static_cast<std::uint32_t>(s.byte) << shift;
    left = s.left;
  }
  const Cut cut{prefix, left, s.equal};
  __syncthreads();  // s may be used again
  return cut;
}

}  // namespace sonicmoe::cuda::router
