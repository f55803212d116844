#include "rig/spot_check.hpp"

#include <algorithm>
#include <cmath>
#include <future>
#include <iterator>
#include <sstream>

#include "oracle/experts.hpp"
#include "oracle/router.hpp"
#include "rig/compare.hpp"
#include "rig/naive.hpp"

namespace sonicmoe::rig {
namespace {

constexpr std::int64_t kUnits = 8;  // hidden units whose weight gradients are checked

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

// One (token, slot), and the row of H that holds it.
struct Slot {
  std::int64_t token, slot, expert, row;
};

// Every slot in the order of H: by expert, stably.
std::vector<Slot> slots_in_row_order(const Tensor& topk_ids) {
  const Values ids = topk_ids.values();
  const std::int64_t K = topk_ids.view().size(1);
  std::vector<Slot> slots;
  for (std::int64_t p = 0; p < topk_ids.numel(); ++p) {
    slots.push_back({p / K, p % K, static_cast<std::int64_t>(ids[at(p)]), 0});
  }
  std::stable_sort(slots.begin(), slots.end(),
                   [](const Slot& a, const Slot& b) { return a.expert < b.expert; });
  for (std::size_t r = 0; r < slots.size(); ++r) slots[r].row = static_cast<std::int64_t>(r);
  return slots;
}

std::vector<Slot> slots_with(const std::vector<Slot>& slots, std::int64_t Slot::* field,
                             std::int64_t value) {
  std::vector<Slot> result;
  std::copy_if(slots.begin(), slots.end(), std::back_inserter(result),
               [&](const Slot& slot) { return slot.*field == value; });
  return result;
}

// The expert that has the fewest rows, but some.
std::int64_t smallest_expert(const std::vector<Slot>& slots, std::int64_t num_experts) {
  Ids rows(at(num_experts), 0);
  for (const Slot& slot : slots) ++rows[at(slot.expert)];
  return std::min_element(
             slots.begin(), slots.end(),
             [&](const Slot& a, const Slot& b) { return rows[at(a.expert)] < rows[at(b.expert)]; })
      ->expert;
}

Ids distinct(const std::vector<Slot>& slots, std::int64_t Slot::* field) {
  Ids values;
  for (const Slot& slot : slots) values.push_back(slot.*field);
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  return values;
}

// `count` of 0..n-1, the first and the last among them.
Ids spread(std::int64_t count, std::int64_t n) {
  count = std::min(count, n);
  Ids values;
  for (std::int64_t i = 0; i < count; ++i) {
    values.push_back(count == 1 ? 0 : i * (n - 1) / (count - 1));
  }
  return values;
}

// Columns of H (rows of W1) of the hidden units: gates, then ups.
Ids columns_of(const Ids& units, const MoECase& whole) {
  Ids columns;
  for (std::int64_t part = 0; part < gate_factor(whole.activation); ++part) {
    for (const std::int64_t unit : units) columns.push_back(part * whole.intermediate_size + unit);
  }
  return columns;
}

// The named rows or columns of a row-major matrix.
Values rows_of(const Values& matrix, std::int64_t width, const Ids& rows) {
  Values result;
  for (const std::int64_t row : rows) {
    result.insert(result.end(), matrix.begin() + row * width, matrix.begin() + (row + 1) * width);
  }
  return result;
}
Values columns_of(const Values& matrix, std::int64_t width, const Ids& columns) {
  Values result;
  for (std::int64_t begin = 0; begin < static_cast<std::int64_t>(matrix.size()); begin += width) {
    for (const std::int64_t column : columns) result.push_back(matrix[at(begin + column)]);
  }
  return result;
}

void append(Values& to, const Values& more) { to.insert(to.end(), more.begin(), more.end()); }

Tensor on_host(DType dtype, std::vector<std::int64_t> shape, const Values& values) {
  Tensor tensor(host_target(), dtype, std::move(shape));
  if (dtype == DType::kInt32) {
    tensor.fill_ids(Ids(values.begin(), values.end()));
  } else {
    tensor.fill(values);
  }
  return tensor;
}

// The selected rows and hidden units as a problem of their own: a pair list over the tokens and
// experts that occur, renumbered. Both are ascending, so that rows keep their order. With fewer
// than all units `out` and dX mean nothing.
struct Part {
  std::vector<Slot> slots;
  Ids tokens, experts, units, columns;
  Tensor x, grad_out, w1, w2, token_ids, expert_ids, weights;
  Values h;
  oracle::ForwardResult forward;
  oracle::BackwardResult backward;

  Part(const LayerResults& whole, std::vector<Slot> selected, std::int64_t num_units)
      : slots(std::move(selected)),
        tokens(distinct(slots, &Slot::token)),
        experts(distinct(slots, &Slot::expert)),
        units(spread(num_units, whole.inputs.description.intermediate_size)),
        columns(columns_of(units, whole.inputs.description)) {
    const MoECase& c = whole.inputs.description;
    const auto T = static_cast<std::int64_t>(tokens.size()), d = c.hidden_size;
    const auto E = static_cast<std::int64_t>(experts.size());
    const auto P = static_cast<std::int64_t>(slots.size());
    Values x_values, grad_values, w1_values, w2_values, of_tokens, of_experts, s;
    for (const std::int64_t t : tokens) {
      append(x_values, whole.inputs.x.block(t));
      append(grad_values, whole.inputs.grad_out.block(t));
    }
    for (const std::int64_t e : experts) {
      append(w1_values, rows_of(whole.inputs.w1.block(e), d, columns));
      append(w2_values, columns_of(whole.inputs.w2.block(e), c.intermediate_size, units));
    }
    const auto place = [](const Ids& sorted, std::int64_t value) {
      return static_cast<double>(std::lower_bound(sorted.begin(), sorted.end(), value) -
                                 sorted.begin());
    };
    for (const Slot& slot : slots) {
      of_tokens.push_back(place(tokens, slot.token));
      of_experts.push_back(place(experts, slot.expert));
      s.push_back(whole.topk_weights.block(slot.token)[at(slot.slot)]);
      append(h, columns_of(whole.h.block(slot.row), c.h_columns(), columns));
    }
    x = on_host(DType::kFloat32, {T, d}, x_values);
    grad_out = on_host(DType::kFloat32, {T, d}, grad_values);
    w1 = on_host(DType::kFloat32, {E, static_cast<std::int64_t>(columns.size()), d}, w1_values);
    w2 = on_host(DType::kFloat32, {E, d, static_cast<std::int64_t>(units.size())}, w2_values);
    token_ids = on_host(DType::kInt32, {P}, of_tokens);
    expert_ids = on_host(DType::kInt32, {P}, of_experts);
    weights = on_host(DType::kFloat32, {P}, s);
    options_ = c.options();
  }

  // Backward from the H that was stored.
  void work_out() {
    forward = oracle::forward(problem());
    backward = oracle::backward(problem(), forward.rows, h, grad_out.view());
  }

  // The largest sum of |terms| behind an element of each result.
  Magnitudes sums() const { return magnitudes(problem(), forward.rows, h, grad_out.view()); }

 private:
  oracle::Problem problem() const {
    return {options_,
            x.view(),
            {w1.view(), {}, w2.view(), {}},
            PairRouting{token_ids.view(), expert_ids.view(), weights.view()}};
  }

  ExpertOptions options_;
};

// Results and references of one tensor, until they are compared.
struct Pair {
  Values actual, expected;
};

class SpotCheck {
 public:
  explicit SpotCheck(const LayerResults& results)
      : r_(results),
        c_(results.inputs.description),
        K_(results.topk_ids.view().size(1)),
        slots_(slots_in_row_order(results.topk_ids)),
        grad_weights_(results.grad_routing_weights.values()),
        weights_(results.topk_weights.values()) {}

  std::vector<std::string> operator()() {
    // The first, a middle and the last token; one expert.
    Ids sample{0, c_.num_tokens / 2, c_.num_tokens - 1};
    sample.erase(std::unique(sample.begin(), sample.end()), sample.end());
    const std::int64_t expert = smallest_expert(slots_, c_.num_experts);
    std::vector<Part> parts;
    for (const std::int64_t t : sample) {
      parts.emplace_back(r_, slots_with(slots_, &Slot::token, t), c_.intermediate_size);
    }
    parts.emplace_back(r_, slots_with(slots_, &Slot::expert, expert), kUnits);
    std::vector<std::future<void>> running;  // each takes one thread
    for (Part& part : parts) {
      running.push_back(std::async([&part] { part.work_out(); }));
    }
    for (std::future<void>& part : running) part.get();

    compare_tokens(sample, parts);
    compare_expert(parts.back());
    if (r_.router_weight != nullptr) {
      Ids experts{expert};
      if (slots_.back().expert != expert) experts.push_back(slots_.back().expert);
      compare_router_weight(experts);
    }
    return problems_;
  }

 private:
  void compare_tokens(const Ids& sample, const std::vector<Part>& parts) {
    Pair out, grad_x, grad_weights;
    for (std::size_t i = 0; i < sample.size(); ++i) {
      const Part& part = parts[i];
      append(out.actual, r_.out.block(sample[i]));
      append(out.expected, part.forward.out);
      append(grad_x.actual, r_.grad_x.block(sample[i]));
      append(grad_x.expected, grad_x_of(part));
      for (std::size_t p = 0; p < part.slots.size(); ++p) {
        grad_weights.actual.push_back(grad_weights_[index(part.slots[p])]);
        grad_weights.expected.push_back(part.backward.grad_routing_weights[p]);
      }
    }
    const auto largest = [&](double Magnitudes::* sum) {
      return [&, sum] {
        double most = 0.0;
        for (std::size_t i = 0; i < sample.size(); ++i) most = std::max(most, parts[i].sums().*sum);
        return most;
      };
    };
    compare("out", out, largest(&Magnitudes::out));
    compare("grad_x", grad_x, largest(&Magnitudes::grad_x));
    compare("grad_routing_weights", grad_weights, largest(&Magnitudes::grad_routing_weights));
  }

  void compare_expert(const Part& part) {
    const std::int64_t e = part.experts[0];
    compare("grad_w1",
            {rows_of(r_.grad_w1.block(e), c_.hidden_size, part.columns), part.backward.grad_w1},
            [&] { return part.sums().grad_w1; });
    compare(
        "grad_w2",
        {columns_of(r_.grad_w2.block(e), c_.intermediate_size, part.units), part.backward.grad_w2},
        [&] { return part.sums().grad_w2; });
  }

  // dX of a part of one token, with the router's share: dLogits Wr.
  Values grad_x_of(const Part& part) const {
    Values result = part.backward.grad_x;
    if (r_.router_weight == nullptr) return result;
    Values s, ds;
    for (const Slot& slot : part.slots) s.push_back(weights_[index(slot)]);
    ds = part.backward.grad_routing_weights;
    for (std::size_t p = 0; p < part.slots.size(); ++p) {
      const double g = logit_gradient(s, ds, p);
      const Values row = r_.router_weight->block(part.slots[p].expert);
      for (std::size_t k = 0; k < row.size(); ++k) result[k] += g * row[k];
    }
    return result;
  }

  // Rows of dWr: the sum over an expert's tokens of dLogit X[t], from the dS that was written.
  void compare_router_weight(const Ids& experts) {
    Pair rows;
    for (const std::int64_t expert : experts) {
      Values sum(at(c_.hidden_size), 0.0);
      for (const Slot& slot : slots_with(slots_, &Slot::expert, expert)) {
        const double g =
            logit_gradient(oracle::row_of(weights_, K_, slot.token),
                           oracle::row_of(grad_weights_, K_, slot.token), at(slot.slot));
        const Values x = r_.inputs.x.block(slot.token);
        for (std::size_t k = 0; k < x.size(); ++k) sum[k] += g * x[k];
      }
      append(rows.actual, r_.grad_router_weight->block(expert));
      append(rows.expected, sum);
    }
    // The one weight of a token cannot vary.
    if (K_ > 1) compare("grad_router_weight", rows, [] { return 0.0; });
  }

  // Softmax over a token's chosen logits, whose values are the weights s: dLogit = s (dS - sum s
  // dS).
  static double logit_gradient(const Values& s, const Values& ds, std::size_t slot) {
    double mean = 0.0;
    for (std::size_t k = 0; k < s.size(); ++k) mean += s[k] * ds[k];
    return s[slot] * (ds[slot] - mean);
  }

  // Bounds relative to max |reference|. bfloat16 has 8 bits of significand and a result passes
  // through about four roundings: a typical error is 0.3%. Sums over d, n and rows are long here.
  // Of a few results all may have nearly cancelled, which the largest of many has not: an error
  // that rounding each of the `terms` explains is none then, but for zeros.
  template <class Magnitude>
  void compare(const char* name, const Pair& pair, Magnitude terms) {
    const bool wide = c_.dtype == DType::kFloat32;
    const double most = wide ? 4e-5 : 8e-2, most_rms = wide ? 2e-5 : 4e-2;
    double scale = 0.0, worst = 0.0, squares = 0.0;
    for (std::size_t i = 0; i < pair.expected.size(); ++i) {
      const double error = std::abs(pair.actual[i] - pair.expected[i]);
      scale = std::max(scale, std::abs(pair.expected[i]));
      worst = std::isfinite(error) ? std::max(worst, error) : INFINITY;
      squares += error * error;
    }
    const double rms = std::sqrt(squares / static_cast<double>(pair.expected.size()));
    const bool few = pair.expected.size() < 64;  // their rms says no more than the worst one
    if (scale > 0.0 && worst <= most * scale && (few || rms <= most_rms * scale)) return;
    const bool zeros = scale > 0.0 && max_abs(pair.actual) == 0.0;
    if (few && !zeros && worst <= relative_floor(c_.dtype) * terms()) return;
    std::ostringstream text;
    text << name << ": error " << worst << ", rms " << rms << " beside max|reference| " << scale;
    problems_.push_back(text.str());
  }

  std::size_t index(const Slot& slot) const { return at(slot.token * K_ + slot.slot); }

  const LayerResults& r_;
  const MoECase& c_;
  std::int64_t K_;
  std::vector<Slot> slots_;
  Values grad_weights_, weights_;
  std::vector<std::string> problems_;
};

}  // namespace

std::vector<std::string> spot_check(const LayerResults& results) { return SpotCheck(results)(); }

}  // namespace sonicmoe::rig
