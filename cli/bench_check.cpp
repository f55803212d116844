// Checks the results that `bench` is about to time, on parts that float64 loops can afford.
#include <algorithm>
#include <cmath>
#include <future>
#include <iterator>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "cli/bench_layer.hpp"
#include "cli/check.hpp"

namespace sonicmoe::cli {
namespace {

constexpr std::int64_t kUnits = 8;  // hidden units whose weight gradients are checked

// One (token, slot) of a top-K problem, and the row of H that holds it.
struct Slot {
  std::int64_t token, slot, expert, row;
};

// Every slot in the order of H: by expert, stably.
std::vector<Slot> slots_in_row_order(const Tensor& topk_ids) {
  const Tensor ids = topk_ids.to_host();
  const std::int64_t K = ids.view().size(1);
  std::vector<Slot> slots;
  for (std::int64_t p = 0; p < ids.view().numel(); ++p) {
    slots.push_back({p / K, p % K, ids.as<std::int32_t>()[p], 0});
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
  std::vector<std::int64_t> rows(static_cast<std::size_t>(num_experts), 0);
  for (const Slot& slot : slots) ++rows[static_cast<std::size_t>(slot.expert)];
  const auto rows_of = [&](const Slot& slot) {
    return rows[static_cast<std::size_t>(slot.expert)];
  };
  return std::min_element(slots.begin(), slots.end(),
                          [&](const Slot& a, const Slot& b) { return rows_of(a) < rows_of(b); })
      ->expert;
}

std::vector<std::int64_t> distinct(const std::vector<Slot>& slots, std::int64_t Slot::* id) {
  std::vector<std::int64_t> values;
  for (const Slot& slot : slots) values.push_back(slot.*id);
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  return values;
}

std::int32_t place_of(const std::vector<std::int64_t>& sorted, std::int64_t value) {
  return static_cast<std::int32_t>(std::lower_bound(sorted.begin(), sorted.end(), value) -
                                   sorted.begin());
}

// `count` of 0..n-1, the first and the last among them.
std::vector<std::int64_t> spread(std::int64_t count, std::int64_t n) {
  count = std::min(count, n);
  std::vector<std::int64_t> values;
  for (std::int64_t i = 0; i < count; ++i) {
    values.push_back(count == 1 ? 0 : i * (n - 1) / (count - 1));
  }
  return values;
}

// Columns of H (rows of W1) of the hidden units: gates, then ups.
std::vector<std::int64_t> hidden_columns(const std::vector<std::int64_t>& units,
                                         const ExpertsConfig& whole) {
  std::vector<std::int64_t> columns;
  for (std::int64_t part = 0; part < gate_factor(whole.options.activation); ++part) {
    for (const std::int64_t unit : units) columns.push_back(part * whole.intermediate_size + unit);
  }
  return columns;
}

// Writes rows `rows` x columns `columns` of a host matrix to `to` from element `first` on. No rows
// or columns named: all.
void copy_part(const Tensor& matrix, const std::vector<std::int64_t>& rows,
               const std::vector<std::int64_t>& columns, Tensor& to, std::size_t first) {
  const auto width = static_cast<std::size_t>(matrix.view().size(1));
  const auto height = static_cast<std::size_t>(matrix.view().size(0));
  const auto pick = [](const std::vector<std::int64_t>& ids, std::size_t i) {
    return ids.empty() ? i : static_cast<std::size_t>(ids[i]);
  };
  for (std::size_t i = 0; i < (rows.empty() ? height : rows.size()); ++i) {
    for (std::size_t j = 0; j < (columns.empty() ? width : columns.size()); ++j) {
      to.set(first++, matrix.at(pick(rows, i) * width + pick(columns, j)));
    }
  }
}

// Row `row` of a matrix on any device, or of it the `columns`, to row `to_row` of `to`.
void copy_row(const Tensor& matrix, std::int64_t row, Tensor& to, std::size_t to_row,
              const std::vector<std::int64_t>& columns = {}) {
  const Tensor values = matrix.block(row);
  const auto width = static_cast<std::size_t>(to.view().size(1));
  for (std::size_t i = 0; i < width; ++i) {
    to.set(to_row * width + i,
           values.at(columns.empty() ? i : static_cast<std::size_t>(columns[i])));
  }
}

// The selected rows and hidden units as a float32 problem of their own on the host: a pair list
// over the tokens and experts that occur, renumbered. Both lists are ascending, so that rows keep
// their order. With fewer than all units `out`, grad_x and the weights' gradients mean nothing.
struct Part {
  std::vector<Slot> slots;
  std::vector<std::int64_t> tokens, experts, units, columns;
  ExpertsInputs inputs;
  Tensor h;

  static ExpertsConfig config(const ExpertsConfig& whole, const Part& part) {
    ExpertsConfig config = whole;
    config.form = MoEShape::Form::kPairs;
    config.dtype = DType::kFloat32;
    config.num_tokens = static_cast<std::int64_t>(part.tokens.size());
    config.num_experts = static_cast<std::int64_t>(part.experts.size());
    config.num_pairs = static_cast<std::int64_t>(part.slots.size());
    config.intermediate_size = static_cast<std::int64_t>(part.units.size());
    return config;
  }

  // The random values that the inputs are made with are all overwritten.
  Part(const ExpertsInputs& whole, const ExpertsRun& run, std::vector<Slot> selected,
       std::int64_t num_units, Random random = Random(0))
      : slots(std::move(selected)),
        tokens(distinct(slots, &Slot::token)),
        experts(distinct(slots, &Slot::expert)),
        units(spread(num_units, whole.config.intermediate_size)),
        columns(hidden_columns(units, whole.config)),
        inputs(config(whole.config, *this), random),
        h(DType::kFloat32,
          {static_cast<std::int64_t>(slots.size()), static_cast<std::int64_t>(columns.size())}) {
    for (std::size_t t = 0; t < tokens.size(); ++t) {
      copy_row(whole.x, tokens[t], inputs.x, t);
      copy_row(whole.grad_out, tokens[t], inputs.grad_out, t);
    }
    for (std::size_t e = 0; e < experts.size(); ++e) {
      copy_part(whole.w1.block(experts[e]), columns, {}, inputs.w1,
                e * inputs.w1.count() / experts.size());
      copy_part(whole.w2.block(experts[e]), {}, units, inputs.w2,
                e * inputs.w2.count() / experts.size());
    }
    const Tensor weights = whole.topk_weights.to_host();
    for (std::size_t p = 0; p < slots.size(); ++p) {
      const Slot& slot = slots[p];
      inputs.token_ids.as<std::int32_t>()[p] = place_of(tokens, slot.token);
      inputs.expert_ids.as<std::int32_t>()[p] = place_of(experts, slot.expert);
      const std::int64_t from = slot.token * whole.config.top_k + slot.slot;
      inputs.pair_weights.set(p, weights.at(static_cast<std::size_t>(from)));
      copy_row(run.h, slot.row, h, p, columns);
    }
  }

  // The part's results on the reference; backward from the H that was stored.
  std::unique_ptr<ExpertsRun> run_reference() const {
    const Context reference = reference_context();
    auto expected = std::make_unique<ExpertsRun>(reference, inputs);
    expected->forward(reference);
    expected->h.copy_from(h);
    expected->backward(reference);
    return expected;
  }
};

// Sums over d, n and rows are longer here than in `check`.
Tolerance bench_tolerance(DType dtype) {
  const Tolerance tolerance = Tolerance::of(dtype);
  return {4 * tolerance.max, 4 * tolerance.rms};
}

// The gradient of the logit that chose `slot`: softmax over a token's chosen logits, whose values
// are the weights s, has dLogit = s (dS - sum s dS).
double logit_gradient(const Tensor& s, const Tensor& ds, std::size_t first, std::size_t top_k,
                      std::size_t slot) {
  double mean = 0.0;
  for (std::size_t k = 0; k < top_k; ++k) {
    mean += static_cast<double>(s.at(first + k)) * static_cast<double>(ds.at(first + k));
  }
  return s.at(first + slot) * (ds.at(first + slot) - mean);
}

// Adds the router's share to dX of a part of one token: dLogits Wr.
void add_router_share(const Part& part, const Tensor& router_weight, ExpertsRun& expected) {
  for (std::size_t p = 0; p < part.slots.size(); ++p) {
    const double g = logit_gradient(part.inputs.pair_weights, expected.grad_routing_weights, 0,
                                    part.slots.size(), p);
    const Tensor row = router_weight.block(part.slots[p].expert);
    for (std::size_t c = 0; c < row.count(); ++c) {
      expected.grad_x.set(c, static_cast<float>(expected.grad_x.at(c) + g * row.at(c)));
    }
  }
}

// Rows of `actual` and of `expected`, one after the other, until they are compared.
class Rows {
 public:
  Rows(std::size_t count, std::int64_t width)
      : actual_(DType::kFloat32, {static_cast<std::int64_t>(count), width}),
        expected_(DType::kFloat32, {static_cast<std::int64_t>(count), width}) {}

  void add(const Tensor& actual, std::int64_t row, const Tensor& expected) {
    copy_row(actual, row, actual_, next_);
    copy_row(expected, 0, expected_, next_++);
  }
  void compare(Findings& findings, const char* name, Tolerance tolerance,
               bool may_vanish = false) const {
    findings.compare(name, actual_, expected_, tolerance, may_vanish);
  }

 private:
  Tensor actual_, expected_;
  std::size_t next_ = 0;
};

// The references of all parts, side by side: each takes one thread.
std::vector<std::unique_ptr<ExpertsRun>> run_references(const std::vector<Part>& parts) {
  std::vector<std::future<std::unique_ptr<ExpertsRun>>> running;
  for (const Part& part : parts) {
    running.push_back(std::async([&part] { return part.run_reference(); }));
  }
  std::vector<std::unique_ptr<ExpertsRun>> results;
  for (auto& reference : running) results.push_back(reference.get());
  return results;
}

void compare_expert(Findings& findings, const ExpertsRun& run, const Part& part,
                    const ExpertsRun& expected, Tolerance tolerance) {
  Tensor grad_w1(DType::kFloat32, {static_cast<std::int64_t>(expected.grad_w1.count())});
  Tensor grad_w2(DType::kFloat32, {static_cast<std::int64_t>(expected.grad_w2.count())});
  copy_part(run.grad_w1.block(part.experts[0]), part.columns, {}, grad_w1, 0);
  copy_part(run.grad_w2.block(part.experts[0]), {}, part.units, grad_w2, 0);
  findings.compare("grad_w1", grad_w1, expected.grad_w1, tolerance);
  findings.compare("grad_w2", grad_w2, expected.grad_w2, tolerance);
}

// dS of the parts, one token each.
void compare_weight_gradients(Findings& findings, const ExpertsRun& run,
                              std::span<const Part> parts,
                              const std::vector<std::unique_ptr<ExpertsRun>>& expected,
                              Tolerance tolerance) {
  const Tensor ds = run.grad_routing_weights.to_host();
  const std::int64_t K = ds.view().size(1);
  Tensor actual(DType::kFloat32, {static_cast<std::int64_t>(parts.size()) * K});
  Tensor reference(DType::kFloat32, {static_cast<std::int64_t>(parts.size()) * K});
  std::size_t i = 0;
  for (std::size_t t = 0; t < parts.size(); ++t) {
    for (std::size_t p = 0; p < parts[t].slots.size(); ++p, ++i) {
      const Slot& slot = parts[t].slots[p];
      actual.set(i, ds.at(static_cast<std::size_t>(slot.token * K + slot.slot)));
      reference.set(i, expected[t]->grad_routing_weights.at(p));
    }
  }
  findings.compare("grad_routing_weights", actual, reference, tolerance);
}

// Rows of dWr: the sum over an expert's tokens of dLogit X[t], from the dS that `run` holds.
void compare_router_weight(Findings& findings, const ExpertsInputs& inputs, const ExpertsRun& run,
                           const std::vector<Slot>& slots, const std::vector<std::int64_t>& experts,
                           const Tensor& grad_router_weight, Tolerance tolerance) {
  const Tensor s = inputs.topk_weights.to_host(), ds = run.grad_routing_weights.to_host();
  const auto K = static_cast<std::size_t>(inputs.config.top_k);
  const auto d = static_cast<std::size_t>(inputs.config.hidden_size);
  Rows rows(experts.size(), inputs.config.hidden_size);
  for (const std::int64_t expert : experts) {
    std::vector<double> sum(d, 0.0);
    for (const Slot& slot : slots_with(slots, &Slot::expert, expert)) {
      const double g = logit_gradient(s, ds, static_cast<std::size_t>(slot.token) * K, K,
                                      static_cast<std::size_t>(slot.slot));
      const Tensor x = inputs.x.block(slot.token);
      for (std::size_t c = 0; c < d; ++c) sum[c] += g * x.at(c);
    }
    Tensor expected(DType::kFloat32, {1, inputs.config.hidden_size});
    for (std::size_t c = 0; c < d; ++c) expected.set(c, static_cast<float>(sum[c]));
    rows.add(grad_router_weight, expert, expected);
  }
  rows.compare(findings, "grad_router_weight", tolerance, /*may_vanish=*/K == 1);
}

}  // namespace

void BenchLayer::check(const Context& context) {
  const std::int64_t T = shape_.num_tokens, d = shape_.hidden_size;
  const std::vector<Slot> slots = slots_in_row_order(inputs_.topk_ids);
  const std::int64_t expert = smallest_expert(slots, shape_.num_experts);
  const Tolerance tolerance = bench_tolerance(shape_.numerics.storage);
  Findings findings;

  // The first, a middle and the last token with all their experts; one expert with all its rows.
  std::vector<std::int64_t> sample{0, T / 2, T - 1};
  sample.erase(std::unique(sample.begin(), sample.end()), sample.end());
  std::vector<Part> parts;
  for (const std::int64_t t : sample) {
    parts.emplace_back(inputs_, run_, slots_with(slots, &Slot::token, t), shape_.intermediate_size);
  }
  parts.emplace_back(inputs_, run_, slots_with(slots, &Slot::expert, expert), kUnits);
  const auto expected = run_references(parts);

  Rows out(sample.size(), d), grad_x(sample.size(), d);
  for (std::size_t i = 0; i < sample.size(); ++i) {
    out.add(run_.out, sample[i], expected[i]->out);
    if (options_.with_router) add_router_share(parts[i], router_weight_, *expected[i]);
    grad_x.add(run_.grad_x, sample[i], expected[i]->grad_x);
  }
  out.compare(findings, "out", tolerance);
  grad_x.compare(findings, "grad_x", tolerance);
  compare_expert(findings, run_, parts.back(), *expected.back(), tolerance);

  if (options_.with_router) {  // a layer does not hand out dS
    const auto bytes = static_cast<std::int64_t>(run_.backward_plan().bytes);
    run_.backward_workspace = Tensor(DType::kUInt8, {bytes}, context.device);
    run_.backward(context);
    run_.backward_workspace = {};
  }
  compare_weight_gradients(findings, run_, std::span(parts).first(sample.size()), expected,
                           tolerance);
  if (options_.with_router) {
    std::vector<std::int64_t> experts{expert};
    if (slots.back().expert != expert) experts.push_back(slots.back().expert);
    compare_router_weight(findings, inputs_, run_, slots, experts, grad_router_weight_, tolerance);
  }
  if (!findings.passed()) throw CheckFailed(findings.problems().front());
}

}  // namespace sonicmoe::cli
