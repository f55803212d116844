#include "core/metadata.hpp"

#include <algorithm>
#include <utility>

#include "sonicmoe/error.hpp"

namespace sonicmoe {
namespace {

// Counts, offsets and the stable placement of pairs. `token` and `expert` map a pair's position.
template <class TokenOf, class ExpertOf>
void place_pairs(const MoEShape& shape, const Metadata& m, TokenOf token, ExpertOf expert) {
  const std::int64_t num_experts = shape.num_experts;
  const auto kept = [&](std::int64_t p) {
    const std::int64_t e = expert(p);
    const std::int64_t t = token(p);
    return e >= 0 && e < num_experts && t >= 0 && t < shape.num_tokens;
  };
  std::fill_n(m.offsets, num_experts, 0);
  for (std::int64_t p = 0; p < shape.num_pairs; ++p) {
    if (kept(p)) ++m.offsets[expert(p)];
  }
  std::int32_t start = 0;  // counts -> starts; the placement below turns starts into ends
  for (std::int64_t e = 0; e < num_experts; ++e) start += std::exchange(m.offsets[e], start);
  for (std::int64_t p = 0; p < shape.num_pairs; ++p) {
    if (!kept(p)) {
      m.pair_row[p] = -1;
      continue;
    }
    const std::int32_t row = m.offsets[expert(p)]++;
    m.row_token[row] = static_cast<std::int32_t>(token(p));
    m.row_pair[row] = static_cast<std::int32_t>(p);
    m.pair_row[p] = row;
  }
  // Places past the last row stay defined, so that metadata compares equal run after run.
  for (std::int64_t r = m.num_rows(); r < shape.num_pairs; ++r) m.row_token[r] = m.row_pair[r] = -1;
}

// token_rows: the kept pairs of each token in input order.
template <class TokenOf>
void group_by_token(const MoEShape& shape, const Metadata& m, TokenOf token) {
  std::fill_n(m.token_start, shape.num_tokens + 1, 0);
  for (std::int64_t p = 0; p < shape.num_pairs; ++p) {
    if (m.pair_row[p] >= 0) ++m.token_start[token(p) + 1];
  }
  for (std::int64_t t = 0; t < shape.num_tokens; ++t) m.token_start[t + 1] += m.token_start[t];
  for (std::int64_t p = 0; p < shape.num_pairs; ++p) {  // starts become ends ...
    if (m.pair_row[p] >= 0) m.token_rows[m.token_start[token(p)]++] = m.pair_row[p];
  }
  for (std::int64_t t = shape.num_tokens; t > 0; --t) m.token_start[t] = m.token_start[t - 1];
  m.token_start[0] = 0;  // ... and starts again
  for (std::int64_t i = m.num_rows(); i < shape.num_pairs; ++i) m.token_rows[i] = -1;
}

void copy_offsets(const MoEShape& shape, const SortedRouting& routing, const Metadata& m) {
  const auto* offsets = routing.offsets.as<std::int32_t>();
  std::int64_t last = 0;
  for (std::int64_t e = 0; e < shape.num_experts; ++e) {
    if (offsets[e] < last || offsets[e] > shape.num_pairs) {
      throw Error("moe_forward", "offsets",
                  "non-decreasing ends within 0.." + std::to_string(shape.num_pairs),
                  std::to_string(offsets[e]) + " after " + std::to_string(last) + " at expert " +
                      std::to_string(e));
    }
    last = m.offsets[e] = offsets[e];
  }
}

void require(bool holds, const char* what) {
  if (!holds) throw Error("moe_backward", "metadata", "what moe_forward wrote for this call", what);
}

bool within(std::int64_t index, std::int64_t end) { return index >= 0 && index < end; }

// token_rows lists each token's rows, each row once: in input order, as group_by_token() does.
void check_tokens_of_pairs(const MoEShape& shape, const Metadata& m) {
  const std::int64_t tokens = shape.num_tokens, rows = m.num_rows();
  require(std::is_sorted(m.token_start, m.token_start + tokens + 1) && m.token_start[0] == 0 &&
              m.token_start[tokens] == rows,
          "tokens out of order");
  for (std::int64_t t = 0; t < tokens; ++t) {
    std::int64_t last_pair = -1;
    for (std::int64_t i = m.token_start[t]; i < m.token_start[t + 1]; ++i) {
      const std::int64_t r = m.token_rows[i];
      require(within(r, rows) && m.row_token[r] == t && m.row_pair[r] > last_pair,
              "a token of no row");
      last_pair = m.row_pair[r];
    }
  }
}

// Calls use(function from position to int64) for an int32 or int64 index tensor.
template <class Use>
void with_ids(const ConstTensorView& ids, Use use) {
  if (ids.dtype() == DType::kInt32) {
    use([p = ids.as<std::int32_t>()](std::int64_t i) { return std::int64_t{p[i]}; });
  } else {
    use([p = ids.as<std::int64_t>()](std::int64_t i) { return p[i]; });
  }
}

}  // namespace

Metadata metadata_view(const MoEShape& shape, void* buffer) {
  auto* next = static_cast<std::int32_t*>(buffer);
  const auto take = [&next](std::int64_t count) { return std::exchange(next, next + count); };
  Metadata m;
  m.num_experts = shape.num_experts;
  m.offsets = take(shape.num_experts);
  if (shape.form == MoEShape::Form::kSorted) return m;
  m.row_token = take(shape.num_pairs);
  m.row_pair = take(shape.num_pairs);
  m.pair_row = take(shape.num_pairs);
  if (shape.form == MoEShape::Form::kPairs) {
    m.token_start = take(shape.num_tokens + 1);
    m.token_rows = take(shape.num_pairs);
  }
  return m;
}

void build_metadata(const MoEShape& shape, const Routing& routing, const Metadata& metadata) {
  if (const auto* sorted = std::get_if<SortedRouting>(&routing)) {
    copy_offsets(shape, *sorted, metadata);
  } else if (const auto* topk = std::get_if<TopKRouting>(&routing)) {
    const std::int64_t k = std::max<std::int64_t>(1, topk->topk_ids.size(1));
    with_ids(topk->topk_ids, [&](auto expert) {
      place_pairs(shape, metadata, [k](std::int64_t p) { return p / k; }, expert);
    });
  } else {
    const auto& pairs = std::get<PairRouting>(routing);
    with_ids(pairs.token_ids, [&](auto token) {
      with_ids(pairs.expert_ids, [&](auto expert) { place_pairs(shape, metadata, token, expert); });
      group_by_token(shape, metadata, token);
    });
  }
}

void check_metadata(const MoEShape& shape, const Metadata& m) {
  const std::int64_t experts = shape.num_experts, pairs = shape.num_pairs;
  require(
      std::is_sorted(m.offsets, m.offsets + experts) && m.offsets[0] >= 0 && m.num_rows() <= pairs,
      "ends of experts out of order");
  if (shape.form == MoEShape::Form::kSorted) return;
  const std::int64_t rows = m.num_rows();
  std::int64_t kept = 0;
  for (std::int64_t p = 0; p < pairs; ++p) {
    const std::int64_t r = m.pair_row[p];
    if (r == -1) continue;
    require(within(r, rows) && m.row_pair[r] == p, "a pair of no row");
    ++kept;
  }
  require(kept == rows, "a row of no pair");  // else each row is one pair's
  if (shape.form == MoEShape::Form::kPairs) return check_tokens_of_pairs(shape, m);
  for (std::int64_t r = 0; r < rows; ++r) {
    require(m.row_token[r] == m.row_pair[r] / (pairs / shape.num_tokens), "a row of another token");
  }
}

const ConstTensorView& routing_weights(const Routing& routing) {
  struct Visitor {
    const ConstTensorView& operator()(const TopKRouting& r) const { return r.topk_weights; }
    const ConstTensorView& operator()(const SortedRouting& r) const { return r.row_weights; }
    const ConstTensorView& operator()(const PairRouting& r) const { return r.pair_weights; }
  };
  return std::visit(Visitor{}, routing);
}

RoutingWeights::RoutingWeights(const Routing& routing) {
  const ConstTensorView& weights = routing_weights(routing);
  if (!weights.defined()) return;
  data_ = weights.data();
  is_bfloat16_ = weights.dtype() == DType::kBFloat16;
}

}  // namespace sonicmoe
