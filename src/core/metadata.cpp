#include "core/metadata.hpp"

#include <algorithm>
#include <utility>

#include "sonicmoe/error.hpp"

namespace sonicmoe {
namespace {

// Which pairs name an expert and a token that exist. `token` and `id` map a pair's position.
template <class TokenOf, class IdOf>
struct Pairs {
  const MoEShape& shape;
  std::int64_t first_expert;
  TokenOf token;
  IdOf id;

  std::int64_t expert(std::int64_t p) const { return id(p) - first_expert; }
  bool kept(std::int64_t p) const {
    const std::int64_t e = id(p), t = token(p);
    return e >= first_expert && e - first_expert < shape.num_experts && t >= 0 &&
           t < shape.num_tokens;
  }
};

// Counts, offsets and the stable placement of pairs. Returns the rows beyond the capacity.
template <class Source>
std::int64_t place_pairs(const MoEShape& shape, const Metadata& m, const Source& pairs) {
  const std::int64_t num_experts = shape.num_experts, capacity = shape.row_capacity();
  std::fill_n(m.offsets, num_experts, 0);
  for (std::int64_t p = 0; p < shape.num_pairs; ++p) {
    if (pairs.kept(p)) ++m.offsets[pairs.expert(p)];
  }
  std::int32_t start = 0;  // counts -> starts; the placement below turns starts into ends
  for (std::int64_t e = 0; e < num_experts; ++e) start += std::exchange(m.offsets[e], start);
  for (std::int64_t p = 0; p < shape.num_pairs; ++p) {
    m.pair_row[p] = -1;
    if (!pairs.kept(p)) continue;
    const std::int32_t row = m.offsets[pairs.expert(p)]++;
    if (row >= capacity) continue;
    m.row_token[row] = static_cast<std::int32_t>(pairs.token(p));
    m.row_pair[row] = static_cast<std::int32_t>(p);
    m.pair_row[p] = row;
  }
  for (std::int64_t e = 0; e < num_experts; ++e) {
    m.offsets[e] = static_cast<std::int32_t>(std::min<std::int64_t>(m.offsets[e], capacity));
  }
  // Places past the last row stay defined, so that metadata compares equal run after run.
  for (std::int64_t r = m.num_rows(); r < capacity; ++r) m.row_token[r] = m.row_pair[r] = -1;
  return start - m.num_rows();
}

// token_rows: the rows of each token's pairs in input order.
template <class Source>
void group_by_token(const MoEShape& shape, const Metadata& m, const Source& pairs) {
  std::fill_n(m.token_start, shape.num_tokens + 1, 0);
  for (std::int64_t p = 0; p < shape.num_pairs; ++p) {
    if (pairs.kept(p)) ++m.token_start[pairs.token(p) + 1];
  }
  for (std::int64_t t = 0; t < shape.num_tokens; ++t) m.token_start[t + 1] += m.token_start[t];
  const std::int64_t kept = m.token_start[shape.num_tokens];
  for (std::int64_t p = 0; p < shape.num_pairs; ++p) {  // starts become ends ...
    if (pairs.kept(p)) m.token_rows[m.token_start[pairs.token(p)]++] = m.pair_row[p];
  }
  for (std::int64_t t = shape.num_tokens; t > 0; --t) m.token_start[t] = m.token_start[t - 1];
  m.token_start[0] = 0;  // ... and starts again
  for (std::int64_t i = kept; i < shape.num_pairs; ++i) m.token_rows[i] = -1;
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

// token_rows lists each token's rows, each row once: in input order, as group_by_token() does. Only
// where all rows of the capacity are used may there be pairs beyond it.
void check_tokens_of_pairs(const MoEShape& shape, const Metadata& m) {
  const std::int64_t tokens = shape.num_tokens, rows = m.num_rows();
  const bool full = rows == shape.row_capacity();
  const std::int64_t most = full ? shape.num_pairs : rows;
  require(std::is_sorted(m.token_start, m.token_start + tokens + 1) && m.token_start[0] == 0 &&
              m.token_start[tokens] >= rows && m.token_start[tokens] <= most,
          "tokens out of order");
  std::int64_t listed = 0;
  for (std::int64_t t = 0; t < tokens; ++t) {
    std::int64_t last_pair = -1;
    for (std::int64_t i = m.token_start[t]; i < m.token_start[t + 1]; ++i) {
      const std::int64_t r = m.token_rows[i];
      if (r == -1 && full) continue;
      require(within(r, rows) && m.row_token[r] == t && m.row_pair[r] > last_pair,
              "a token of no row");
      last_pair = m.row_pair[r];
      ++listed;
    }
  }
  require(listed == rows, "a row of no token");
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
  m.row_token = take(shape.row_capacity());
  m.row_pair = take(shape.row_capacity());
  m.pair_row = take(shape.num_pairs);
  if (shape.form == MoEShape::Form::kPairs) {
    m.token_start = take(shape.num_tokens + 1);
    m.token_rows = take(shape.num_pairs);
  }
  return m;
}

std::int64_t build_metadata(const MoEShape& shape, const Routing& routing,
                            const Metadata& metadata) {
  std::int64_t beyond = 0;
  if (const auto* sorted = std::get_if<SortedRouting>(&routing)) {
    copy_offsets(shape, *sorted, metadata);
  } else if (const auto* topk = std::get_if<TopKRouting>(&routing)) {
    const std::int64_t k = std::max<std::int64_t>(1, topk->topk_ids.size(1));
    const auto token = [k](std::int64_t p) { return p / k; };
    with_ids(topk->topk_ids, [&](auto id) {
      beyond = place_pairs(shape, metadata, Pairs{shape, topk->first_expert, token, id});
    });
  } else {
    const auto& list = std::get<PairRouting>(routing);
    with_ids(list.token_ids, [&](auto token) {
      with_ids(list.expert_ids, [&](auto id) {
        const Pairs pairs{shape, list.first_expert, token, id};
        beyond = place_pairs(shape, metadata, pairs);
        group_by_token(shape, metadata, pairs);
      });
    });
  }
  return beyond;
}

void store_rows_dropped(const TensorView& rows_dropped, std::int64_t count) {
  if (rows_dropped.defined()) *rows_dropped.as<std::int32_t>() = static_cast<std::int32_t>(count);
}

void check_metadata(const MoEShape& shape, const Metadata& m) {
  const std::int64_t experts = shape.num_experts, pairs = shape.num_pairs;
  require(std::is_sorted(m.offsets, m.offsets + experts) && m.offsets[0] >= 0 &&
              m.num_rows() <= shape.row_capacity(),
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
