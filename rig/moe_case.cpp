#include "rig/moe_case.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <utility>

#include "rig/random.hpp"

namespace sonicmoe::rig {
namespace {

constexpr std::int64_t kInt32Max = std::numeric_limits<std::int32_t>::max();

// Draws an expert id under the load of the case, or a dropped one.
class ExpertChoice {
 public:
  ExpertChoice(const MoECase& description, Random& random) : case_(description), random_(random) {
    const std::int64_t E = case_.num_experts, first = case_.first_expert;
    favourite_ = random_.integer(0, E - 1);
    outside_ = {-1,        first - 1,
                first + E, first + E + 7,
                kInt32Max, std::numeric_limits<std::int32_t>::min()};
    if (case_.id_dtype == DType::kInt64) {
      outside_.push_back(std::numeric_limits<std::int64_t>::min());
      outside_.push_back(std::numeric_limits<std::int64_t>::max());
      // The first expert if someone keeps the low half.
      outside_.push_back((std::int64_t{1} << 32) + first);
    }
  }
  // Counted from the first expert.
  std::int64_t inside() {
    switch (case_.load) {
      case Load::kOneExpert:
        return favourite_;
      case Load::kSomeEmpty:
        return (favourite_ + 3 * random_.integer(0, case_.num_experts / 3)) % case_.num_experts;
      case Load::kUniform:
        break;
    }
    return random_.integer(0, case_.num_experts - 1);
  }
  bool dropped() { return random_.chance(case_.drop_probability); }
  // An id, as those of the caller are.
  std::int64_t outside() { return random_.pick(outside_); }

 private:
  const MoECase& case_;
  Random& random_;
  std::int64_t favourite_;
  std::vector<std::int64_t> outside_;
};

// The ids of K experts of one token: different ones where the load allows that.
std::vector<std::int64_t> choose_slots(ExpertChoice& choice, const MoECase& description) {
  std::vector<std::int64_t> slots;
  while (static_cast<std::int64_t>(slots.size()) < description.top_k) {
    std::int64_t expert = choice.inside();
    for (int attempt = 0; attempt < 20; ++attempt) {
      if (std::find(slots.begin(), slots.end(), expert) == slots.end()) break;
      expert = choice.inside();
    }
    slots.push_back(expert);
  }
  for (std::int64_t& slot : slots) {
    slot = choice.dropped() ? choice.outside() : slot + description.first_expert;
  }
  return slots;
}

std::vector<double> normal_values(Random& random, std::int64_t count, double scale) {
  std::vector<double> values(static_cast<std::size_t>(count));
  for (double& value : values) value = scale * random.normal();
  return values;
}

// -1, 0 or 1, or with `bound` up to +-bound; zero with the given probability.
std::vector<double> integer_values(Random& random, std::int64_t count, double zero_probability,
                                   std::int64_t bound = 1) {
  std::vector<double> values(static_cast<std::size_t>(count));
  for (double& value : values) {
    value = random.chance(zero_probability)
                ? 0.0
                : static_cast<double>(random.integer(1, bound) * (random.chance(0.5) ? 1 : -1));
  }
  return values;
}

// Sets the rows of [rows, columns] that nobody uses to NaN.
void poison_unused(std::vector<double>& values, std::int64_t columns,
                   const std::vector<std::int64_t>& used) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    const auto row = static_cast<std::int64_t>(i) / columns;
    if (!std::binary_search(used.begin(), used.end(), row)) {
      values[i] = std::numeric_limits<double>::quiet_NaN();
    }
  }
}

}  // namespace

MoECase fitted(const Target& target, MoECase c) {
  if (target.device.type != DeviceType::kCuda) return c;
  const auto unpadded = [](Strides strides) {
    return strides == Strides::kPadded             ? Strides::kContiguous
           : strides == Strides::kTransposedPadded ? Strides::kTransposed
                                                   : strides;
  };
  c.dtype = DType::kBFloat16;
  c.hidden_size = (c.hidden_size + 7) / 8 * 8;
  c.intermediate_size = (c.intermediate_size + 7) / 8 * 8;
  c.x_strides = unpadded(c.x_strides);
  c.w1_strides = unpadded(c.w1_strides);
  c.w2_strides = unpadded(c.w2_strides);
  return c;
}

std::string MoECase::describe() const {
  std::ostringstream out;
  out << "T=" << tokens() << " d=" << hidden_size << " n=" << intermediate_size
      << " E=" << num_experts << " form=" << "ABC"[static_cast<int>(form)];
  if (form == MoEShape::Form::kTopK) out << " K=" << top_k;
  if (form != MoEShape::Form::kTopK) out << " P=" << num_pairs;
  if (form == MoEShape::Form::kSorted) out << " tail=" << tail_rows << " s=" << row_weights;
  out << ' ' << sonicmoe::name_of(activation) << ' ' << sonicmoe::name_of(gate_up_layout) << ' '
      << sonicmoe::name_of(dtype) << " ids=" << sonicmoe::name_of(id_dtype)
      << " weights=" << sonicmoe::name_of(routing_weight_dtype) << " biases=" << biases
      << " x=" << name_of(x_strides) << " w1=" << name_of(w1_strides)
      << " w2=" << name_of(w2_strides) << " load=" << static_cast<int>(load)
      << " drop=" << drop_probability << (deterministic ? "" : " any order");
  if (first_expert != 0) out << " first_expert=" << first_expert;
  if (max_rows) out << " max_rows=" << *max_rows;
  out << (zero_absent_tokens ? "" : " absent tokens as they are")
      << (values == Numbers::kIntegers ? " integers" : "") << " seed=" << seed
      << (fill ? " filled by the test" : "");
  return out.str();
}

MoEInputs::MoEInputs(const Target& target, const MoECase& test_case) : description(test_case) {
  const MoECase& c = description;
  x = Tensor(target, c.dtype, {c.tokens(), c.hidden_size}, c.x_strides);
  grad_out = Tensor(target, c.dtype, {c.tokens(), c.hidden_size}, c.x_strides);
  w1 = Tensor(target, c.dtype, {c.num_experts, c.h_columns(), c.hidden_size}, c.w1_strides);
  w2 = Tensor(target, c.dtype, {c.num_experts, c.hidden_size, c.intermediate_size}, c.w2_strides);
  if (c.biases) {
    b1 = Tensor(target, c.dtype, {c.num_experts, c.h_columns()});
    b2 = Tensor(target, c.dtype, {c.num_experts, c.hidden_size});
  }
  fill_routing(target);
  fill_values();
  if (c.fill) c.fill(*this);
}

void MoEInputs::fill_routing(const Target& target) {
  const MoECase& c = description;
  Random random(c.seed * 2 + 1);
  ExpertChoice choice(c, random);
  std::vector<oracle::Row> rows;
  if (c.form == MoEShape::Form::kTopK) {
    std::vector<std::int64_t> ids;
    for (std::int64_t t = 0; t < c.num_tokens; ++t) {
      for (const std::int64_t id : choose_slots(choice, c)) {
        const std::int64_t e = id < c.first_expert ? -1 : id - c.first_expert;
        if (e >= 0 && e < c.num_experts) {
          rows.push_back({static_cast<std::int64_t>(ids.size()), t, e});
        }
        ids.push_back(id);
      }
    }
    topk_ids = Tensor(target, c.id_dtype, {c.num_tokens, c.top_k});
    topk_ids.fill_ids(ids);
    routing_weights = Tensor(target, c.routing_weight_dtype, {c.num_tokens, c.top_k});
  } else if (c.form == MoEShape::Form::kPairs) {
    std::vector<std::int64_t> tokens, experts;
    for (std::int64_t p = 0; p < c.num_pairs; ++p) {
      tokens.push_back(c.num_tokens == 0 ? -1 : random.integer(0, c.num_tokens - 1));
      const std::int64_t e = choice.inside();
      experts.push_back(e + c.first_expert);
      if (!choice.dropped()) {
        if (c.num_tokens > 0) rows.push_back({p, tokens.back(), e});
      } else if (random.chance(0.5)) {
        experts.back() = choice.outside();
      } else {
        tokens.back() = random.chance(0.5) ? c.num_tokens : -1 - random.integer(0, 5);
      }
    }
    token_ids = Tensor(target, c.id_dtype, {c.num_pairs});
    expert_ids = Tensor(target, c.id_dtype, {c.num_pairs});
    token_ids.fill_ids(tokens);
    expert_ids.fill_ids(experts);
    routing_weights = Tensor(target, c.routing_weight_dtype, {c.num_pairs});
  } else {
    const std::int64_t count = std::max<std::int64_t>(c.num_pairs - c.tail_rows, 0);
    std::vector<std::int64_t> ends(static_cast<std::size_t>(c.num_experts), 0);
    for (std::int64_t r = 0; r < count; ++r) {
      rows.push_back({r, r, 0});
      for (std::int64_t e = choice.inside(); e < c.num_experts; ++e) {
        ++ends[static_cast<std::size_t>(e)];
      }
    }
    offsets = Tensor(target, DType::kInt32, {c.num_experts});
    offsets.fill_ids(ends);
    if (c.row_weights) routing_weights = Tensor(target, c.routing_weight_dtype, {c.num_pairs});
  }
  keep_rows(std::move(rows));
}

// As the library numbers and drops them.
void MoEInputs::keep_rows(std::vector<oracle::Row> rows) {
  std::stable_sort(rows.begin(), rows.end(),
                   [](const oracle::Row& a, const oracle::Row& b) { return a.expert < b.expert; });
  const std::size_t kept =
      std::min(rows.size(), static_cast<std::size_t>(description.row_capacity()));
  rows_beyond_ = static_cast<std::int64_t>(rows.size() - kept);
  rows.resize(kept);
  for (const oracle::Row& row : rows) used_tokens_.push_back(row.token);
  std::sort(used_tokens_.begin(), used_tokens_.end());
}

void MoEInputs::fill_values() {
  const MoECase& c = description;
  Random random(c.seed * 2);
  if (routing_weights.defined()) {
    Random of_weights(c.seed * 2 + 2);
    Values weights(static_cast<std::size_t>(routing_weights.numel()));
    for (double& weight : weights) {
      weight = c.values == Numbers::kIntegers ? static_cast<double>(of_weights.integer(-1, 2))
                                              : 0.1 + 0.9 * of_weights.uniform();
    }
    routing_weights.fill(weights);
  }
  const auto d = static_cast<double>(std::max<std::int64_t>(c.hidden_size, 1));
  const auto n = static_cast<double>(std::max<std::int64_t>(c.intermediate_size, 1));
  if (c.values == Numbers::kLarge) {
    x.fill_random(random, 1.0);
    grad_out.fill_random(random, 1.0);
    w1.fill_random(random, 1.0 / std::sqrt(d));
    w2.fill_random(random, 1.0 / std::sqrt(n));
    if (c.biases) b1.fill_random(random, 0.5), b2.fill_random(random, 0.5);
    return;
  }
  const bool integers = c.values == Numbers::kIntegers;
  std::vector<double> rows =
      integers ? integer_values(random, x.numel(), 0.5) : normal_values(random, x.numel(), 1.0);
  poison_unused(rows, c.hidden_size, used_tokens_);
  x.fill(rows);
  rows = integers ? integer_values(random, x.numel(), 0.5) : normal_values(random, x.numel(), 1.0);
  poison_unused(rows, c.hidden_size, used_tokens_);
  grad_out.fill(rows);
  w1.fill(integers ? integer_values(random, w1.numel(), 0.75)
                   : normal_values(random, w1.numel(), 1.0 / std::sqrt(d)));
  w2.fill(integers ? integer_values(random, w2.numel(), 0.75)
                   : normal_values(random, w2.numel(), 1.0 / std::sqrt(n)));
  if (c.biases) {
    b1.fill(integers ? integer_values(random, b1.numel(), 0.5)
                     : normal_values(random, b1.numel(), 0.5));
    b2.fill(integers ? integer_values(random, b2.numel(), 0.5, 3)
                     : normal_values(random, b2.numel(), 0.5));
  }
}

ExpertWeights MoEInputs::weights() const { return {w1.view(), b1.view(), w2.view(), b2.view()}; }

Routing MoEInputs::routing() const {
  switch (description.form) {
    case MoEShape::Form::kTopK:
      return TopKRouting{topk_ids.view(), routing_weights.view(), description.first_expert};
    case MoEShape::Form::kSorted:
      return SortedRouting{offsets.view(), routing_weights.view()};
    case MoEShape::Form::kPairs:
      return PairRouting{token_ids.view(), expert_ids.view(), routing_weights.view(),
                         description.first_expert};
  }
  return {};
}

MoEShape MoEInputs::shape() const {
  return moe_shape(description.options(), x.view(), weights(), routing());
}

oracle::Problem MoEInputs::problem() const {
  return {description.options(), x.view(), weights(), routing()};
}

std::vector<std::string> MoEInputs::violations() const {
  std::vector<std::string> result;
  const auto check = [&](const char* name, const Tensor& tensor) {
    const std::string violation = tensor.violation_as_input();
    if (!violation.empty()) result.push_back(std::string(name) + ": " + violation);
  };
  check("x", x);
  check("grad_out", grad_out);
  check("w1", w1);
  check("b1", b1);
  check("w2", w2);
  check("b2", b2);
  check("topk_ids", topk_ids);
  check("offsets", offsets);
  check("token_ids", token_ids);
  check("expert_ids", expert_ids);
  check("routing_weights", routing_weights);
  return result;
}

}  // namespace sonicmoe::rig
