#include "router/token_rounding.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <string>

#include "core/parallel.hpp"
#include "core/workspace.hpp"
#include "math/exact_sum.hpp"
#include "math/order.hpp"
#include "router/rounding_policy.hpp"
#include "sonicmoe/error.hpp"

namespace sonicmoe {
namespace {

static_assert(kTokenBlock == 64, "one block of tokens is one word of the chosen bits");

// One expert's tokens fall into two classes: those that chose it and the others.
enum class Class : std::uint8_t { kChosen, kOther };

struct Column {
  const std::uint32_t* keys;    // [T]
  const std::uint64_t* chosen;  // [ceil(T/64)]
  std::int64_t num_tokens;
};

Column column_of(const RoundingBuffers& buffers, std::int64_t expert) {
  return {buffers.keys + expert * buffers.num_tokens, buffers.chosen + expert * buffers.words(),
          buffers.num_tokens};
}

// Calls visit(token) for the members of a class, in ascending order.
template <class Visit>
void for_each_member(const Column& column, Class wanted, Visit&& visit) {
  for (std::int64_t begin = 0; begin < column.num_tokens; begin += 64) {
    std::uint64_t members = column.chosen[begin / 64];
    if (wanted == Class::kOther) {
      members = ~members;
      const std::int64_t left = column.num_tokens - begin;
      if (left < 64) members &= (std::uint64_t{1} << left) - 1;
    }
    for (; members != 0; members &= members - 1) visit(begin + std::countr_zero(members));
  }
}

// Keeps the keys above the threshold and the first `ties` of those equal to it.
struct Cut {
  std::uint32_t threshold = 0xffffffffu;  // no number has this key: keeps nothing
  std::int64_t ties = 0;

  // To be asked once per member, in ascending token order.
  bool keeps(std::uint32_t key) noexcept {
    return key > threshold || (key == threshold && ties-- > 0);
  }
};

// The cut that keeps `count` members of a class: a radix selection from the top byte down, so no
// scratch and four passes over the members. The class has at least `count` members.
Cut find_cut(const Column& column, Class wanted, std::int64_t count) {
  if (count == 0) return {};
  std::uint32_t prefix = 0;  // bytes decided so far
  std::int64_t left = count;
  for (int shift = 24; shift >= 0; shift -= 8) {
    std::array<std::int64_t, 256> histogram{};
    const std::uint32_t decided = shift == 24 ? 0u : 0xffffffffu << (shift + 8);
    for_each_member(column, wanted, [&](std::int64_t token) {
      const std::uint32_t key = column.keys[token];
      if ((key & decided) == prefix) ++histogram[(key >> shift) & 0xffu];
    });
    std::uint32_t byte = 255;
    while (byte > 0 && histogram[byte] < left) left -= histogram[byte--];
    prefix |= byte << shift;
  }
  return {prefix, left};
}

// Of kNearestScore: whether adding the strongest others changes the expert's summed score by less
// than dropping its weakest rows does. Exact sums, so the answer needs no agreement on an order.
bool up_changes_less(const Column& column, std::int64_t rows, std::int64_t tile) {
  const std::int64_t floor = rows - rows % tile;
  Cut kept = find_cut(column, Class::kChosen, floor);
  ExactSum dropped{};
  for_each_member(column, Class::kChosen, [&](std::int64_t token) {
    if (!kept.keeps(column.keys[token])) dropped.add(key_value(column.keys[token]));
  });
  Cut strongest = find_cut(column, Class::kOther, floor + tile - rows);
  ExactSum added{};
  for_each_member(column, Class::kOther, [&](std::int64_t token) {
    if (strongest.keeps(column.keys[token])) added.add(key_value(column.keys[token]));
  });
  return ExactSum::magnitude_is_less(added, dropped);
}

// Writes the expert's rows in ascending token order.
void write_rows(const Column& column, std::int64_t before, std::int64_t after,
                std::int32_t* token_ids) {
  if (after <= before) {
    Cut kept = find_cut(column, Class::kChosen, after);
    for_each_member(column, Class::kChosen, [&](std::int64_t token) {
      if (kept.keeps(column.keys[token])) *token_ids++ = static_cast<std::int32_t>(token);
    });
    return;
  }
  Cut added = find_cut(column, Class::kOther, after - before);
  for (std::int64_t token = 0; token < column.num_tokens; ++token) {
    const bool is_chosen = ((column.chosen[token / 64] >> (token % 64)) & 1u) != 0;
    if (is_chosen || added.keeps(column.keys[token])) {
      *token_ids++ = static_cast<std::int32_t>(token);
    }
  }
}

void count_rows(const Context& context, const RoundingOptions& rounding,
                const RoundingBuffers& buffers) {
  const int threads = thread_count(context.num_threads);
  parallel_for(threads, buffers.num_experts, [&](std::int64_t expert, int) {
    const Column column = column_of(buffers, expert);
    std::int32_t rows = 0;
    for (std::int64_t w = 0; w < buffers.words(); ++w) rows += std::popcount(column.chosen[w]);
    buffers.rows_before[expert] = rows;
    const std::int64_t remainder = rows % rounding.tile;
    const bool asked = rounding.policy == RoundingPolicy::kNearestScore && remainder != 0 &&
                       rows - remainder + rounding.tile <= buffers.num_tokens;
    buffers.up_changes_less[expert] = asked && up_changes_less(column, rows, rounding.tile);
  });
}

}  // namespace

std::size_t carve_rounding_buffers(void* base, std::int64_t num_tokens, std::int64_t num_experts,
                                   RoundingBuffers& buffers) {
  WorkspaceCarver carver(base);
  const auto tokens = static_cast<std::size_t>(num_tokens);
  const auto experts = static_cast<std::size_t>(num_experts);
  buffers.num_tokens = num_tokens;
  buffers.num_experts = num_experts;
  buffers.normalizers = carver.take<TokenNormalizer>(tokens);
  buffers.keys = carver.take<std::uint32_t>(experts * tokens);
  buffers.chosen = carver.take<std::uint64_t>(experts * static_cast<std::size_t>(buffers.words()));
  buffers.starts = carver.take<std::int64_t>(experts + 1);
  buffers.rows_before = carver.take<std::int32_t>(experts);
  buffers.rows_after = carver.take<std::int32_t>(experts);
  buffers.up_changes_less = carver.take<std::uint8_t>(experts);
  return carver.used();
}

ColumnBlock::ColumnBlock(const RoundingBuffers& buffers, std::int64_t begin, std::int64_t end)
    : buffers_(buffers),
      begin_(begin),
      end_(end),
      keys_(static_cast<std::size_t>((end - begin) * buffers.num_experts)),
      chosen_(static_cast<std::size_t>(buffers.num_experts)) {}

bool ColumnBlock::set(std::int64_t token, const float* scores, const std::int32_t* ids,
                      std::int64_t top_k) {
  std::uint32_t* row = keys_.data() + (token - begin_) * buffers_.num_experts;
  std::transform(scores, scores + buffers_.num_experts, row,
                 [](float score) { return ordered_key(score); });
  const std::uint64_t bit = std::uint64_t{1} << (token - begin_);
  for (std::int64_t k = 0; k < top_k; ++k) {
    if (ids[k] < 0 || ids[k] >= buffers_.num_experts) return false;
    std::uint64_t& word = chosen_[static_cast<std::size_t>(ids[k])];
    if ((word & bit) != 0) return false;
    word |= bit;
  }
  return true;
}

void ColumnBlock::store() const {
  for (std::int64_t e = 0; e < buffers_.num_experts; ++e) {
    std::uint32_t* column = buffers_.keys + e * buffers_.num_tokens;
    for (std::int64_t t = begin_; t < end_; ++t) {
      column[t] = keys_[static_cast<std::size_t>((t - begin_) * buffers_.num_experts + e)];
    }
    buffers_.chosen[e * buffers_.words() + begin_ / kTokenBlock] =
        chosen_[static_cast<std::size_t>(e)];
  }
}

void check_targets(const char* operation, const ConstTensorView& targets, std::int64_t num_tokens,
                   std::int64_t capacity) {
  if (!targets.defined()) return;
  std::int64_t sum = 0;
  for (std::int64_t e = 0; e < targets.numel(); ++e) {
    const std::int64_t rows = targets.as<std::int32_t>()[e];
    if (rows < 0 || rows > num_tokens) {
      throw Error(operation, "targets", "rows in 0.." + std::to_string(num_tokens),
                  std::to_string(rows) + " for expert " + std::to_string(e));
    }
    sum += rows;
  }
  if (sum > capacity) {
    throw Error(operation, "targets", "at most " + std::to_string(capacity) + " rows in sum",
                std::to_string(sum));
  }
}

void select_rounded_rows(const Context& context, const RoundingOptions& rounding,
                         const ConstTensorView& targets, const RoundingBuffers& buffers,
                         const RoundingOutputs& outputs) {
  count_rows(context, rounding, buffers);
  RowRounder rounder(rounding, buffers.num_tokens);
  buffers.starts[0] = 0;
  for (std::int64_t e = 0; e < buffers.num_experts; ++e) {
    const std::int64_t rows = targets.defined() ? targets.as<std::int32_t>()[e]
                                                : rounder.next(e, buffers.rows_before[e],
                                                               buffers.up_changes_less[e] != 0);
    buffers.rows_after[e] = static_cast<std::int32_t>(rows);
    buffers.starts[e + 1] = buffers.starts[e] + rows;
  }
  const auto copy_counts = [&](const std::int32_t* counts, const TensorView& out) {
    if (out.defined()) std::copy_n(counts, buffers.num_experts, out.as<std::int32_t>());
  };
  copy_counts(buffers.rows_before, outputs.rows_per_expert_before);
  copy_counts(buffers.rows_after, outputs.rows_per_expert);

  parallel_for(thread_count(context.num_threads), buffers.num_experts, [&](std::int64_t e, int) {
    const std::int64_t start = buffers.starts[e];
    write_rows(column_of(buffers, e), buffers.rows_before[e], buffers.rows_after[e],
               outputs.token_ids + start);
    std::fill(outputs.expert_ids + start, outputs.expert_ids + buffers.starts[e + 1],
              static_cast<std::int32_t>(e));
  });
  const std::int64_t used = buffers.starts[buffers.num_experts];
  std::fill(outputs.token_ids + used, outputs.token_ids + outputs.capacity, -1);
  std::fill(outputs.expert_ids + used, outputs.expert_ids + outputs.capacity, -1);
}

}  // namespace sonicmoe
