#include "oracle/experts.hpp"

#include <algorithm>
#include <cstddef>
#include <utility>

#include "oracle/activation.hpp"

namespace sonicmoe::oracle {
namespace {

// The pairs that are not dropped, in input order.
std::vector<Row> input_rows(const Routing& routing, std::int64_t num_tokens,
                            std::int64_t num_experts) {
  std::vector<Row> rows;
  const auto add = [&](std::int64_t position, std::int64_t token, std::int64_t id,
                       std::int64_t first_expert) {
    const bool dropped =
        token < 0 || token >= num_tokens || id < first_expert || id - first_expert >= num_experts;
    if (!dropped) rows.push_back({position, token, id - first_expert});
  };
  if (const auto* top_k = std::get_if<TopKRouting>(&routing)) {
    const std::int64_t slots = top_k->topk_ids.size(1);
    const Ids experts = to_ids(top_k->topk_ids);
    for (std::int64_t p = 0; p < num_tokens * slots; ++p)
      add(p, p / slots, experts[at(p)], top_k->first_expert);
  } else if (const auto* pairs = std::get_if<PairRouting>(&routing)) {
    const Ids tokens = to_ids(pairs->token_ids), experts = to_ids(pairs->expert_ids);
    for (std::size_t p = 0; p < tokens.size(); ++p) {
      add(static_cast<std::int64_t>(p), tokens[p], experts[p], pairs->first_expert);
    }
  } else {
    const Ids ends = to_ids(std::get<SortedRouting>(routing).offsets);
    std::int64_t row = 0;
    for (std::int64_t e = 0; e < num_experts; ++e) {
      for (; row < ends[at(e)]; ++row) add(row, row, e, 0);
    }
  }
  return rows;
}

const ConstTensorView& weights_view(const Routing& routing) {
  if (const auto* top_k = std::get_if<TopKRouting>(&routing)) return top_k->topk_weights;
  if (const auto* pairs = std::get_if<PairRouting>(&routing)) return pairs->pair_weights;
  return std::get<SortedRouting>(routing).row_weights;
}

// Extents and float64 copies of what forward and backward share.
struct Layer {
  std::int64_t T, d, n, E, columns;  // columns = g*n
  bool gated;
  DType dtype;
  ExpertOptions options;
  Values x_data, w1_data, b1_data, w2_data, b2_data;
  Matrix x, b1, b2;
  Cube w1, w2;

  explicit Layer(const Problem& p)
      : T(p.x.size(0)),
        d(p.x.size(1)),
        n(p.weights.w2.size(2)),
        E(p.weights.w1.size(0)),
        columns(p.weights.w1.size(1)),
        gated(is_gated(p.options.activation)),
        dtype(p.x.dtype()),
        options(p.options),
        x_data(to_double(p.x)),
        w1_data(to_double(p.weights.w1)),
        b1_data(p.weights.b1.defined() ? to_double(p.weights.b1) : zeros(E * columns)),
        w2_data(to_double(p.weights.w2)),
        b2_data(p.weights.b2.defined() ? to_double(p.weights.b2) : zeros(E * d)),
        x{&x_data, d},
        b1{&b1_data, columns},
        b2{&b2_data, d},
        w1{&w1_data, columns, d},
        w2{&w2_data, d, n} {}
  Layer(const Layer&) = delete;
  Layer& operator=(const Layer&) = delete;

  // Columns of H that hold gate j and up j.
  std::int64_t gate_column(std::int64_t j) const {
    return gated && options.gate_up_layout == GateUpLayout::kInterleaved ? 2 * j : j;
  }
  std::int64_t up_column(std::int64_t j) const {
    return options.gate_up_layout == GateUpLayout::kInterleaved ? 2 * j + 1 : n + j;
  }
  ActivationValue activate_row(const Matrix& h, std::int64_t r, std::int64_t j) const {
    return activate(options, h(r, gate_column(j)), gated ? h(r, up_column(j)) : 0.0);
  }
};

}  // namespace

std::vector<Row> sorted_rows(const Routing& routing, std::int64_t num_tokens,
                             std::int64_t num_experts) {
  std::vector<Row> rows = input_rows(routing, num_tokens, num_experts);
  std::stable_sort(rows.begin(), rows.end(),
                   [](const Row& a, const Row& b) { return a.expert < b.expert; });
  return rows;
}

std::vector<Row> rows_of(const Problem& problem) {
  std::vector<Row> rows =
      sorted_rows(problem.routing, problem.x.size(0), problem.weights.w1.size(0));
  if (const auto& most = problem.options.max_rows) {
    rows.resize(std::min(rows.size(), static_cast<std::size_t>(*most)));
  }
  return rows;
}

Values routing_weights(const Routing& routing, std::int64_t num_pairs) {
  const ConstTensorView& view = weights_view(routing);
  if (!view.defined()) return Values(static_cast<std::size_t>(num_pairs), 1.0);
  return to_double(view);
}

ForwardResult forward(const Problem& problem, Storage storage) {
  const Layer layer(problem);
  const auto round_h = [&](double v) {
    return storage == Storage::kExact ? v : rounded_to(layer.dtype, v);
  };
  const auto round = [&](double v) {
    return storage == Storage::kAll ? rounded_to(layer.dtype, v) : v;
  };

  ForwardResult result;
  result.rows = rows_of(problem);
  const auto R = static_cast<std::int64_t>(result.rows.size());
  const Values weights = routing_weights(problem.routing, layer.T);
  result.h = zeros(R * layer.columns);
  result.a = zeros(R * layer.n);
  result.out = zeros(layer.T * layer.d);
  const Matrix h{&result.h, layer.columns}, a{&result.a, layer.n}, out{&result.out, layer.d};

  for (std::int64_t r = 0; r < R; ++r) {
    const auto [position, t, e] = result.rows[static_cast<std::size_t>(r)];
    const double s = weights[at(position)];
    for (std::int64_t c = 0; c < layer.columns; ++c) {
      double sum = layer.b1(e, c);
      for (std::int64_t k = 0; k < layer.d; ++k) sum += layer.x(t, k) * layer.w1(e, c, k);
      h(r, c) = round_h(sum);
    }
    for (std::int64_t j = 0; j < layer.n; ++j) a(r, j) = round(layer.activate_row(h, r, j).value);
    for (std::int64_t k = 0; k < layer.d; ++k) {
      double y = layer.b2(e, k);
      for (std::int64_t j = 0; j < layer.n; ++j) y += a(r, j) * layer.w2(e, k, j);
      out(t, k) += s * round(y);
    }
  }
  return result;
}

HiddenGradients backward_hidden(const Problem& problem, const std::vector<Row>& rows,
                                const Values& stored_h, const ConstTensorView& grad_out,
                                Storage storage) {
  const Layer layer(problem);
  const auto round = [&](double v) {
    return storage == Storage::kAll ? rounded_to(layer.dtype, v) : v;
  };
  const auto R = static_cast<std::int64_t>(rows.size());
  const Values weights = routing_weights(problem.routing, layer.T);
  Values d_out_data = to_double(grad_out);
  Values h_data = stored_h;
  const Matrix d_out{&d_out_data, layer.d}, h{&h_data, layer.columns};

  HiddenGradients result;
  result.grad_h = zeros(R * layer.columns);
  result.scaled_a = zeros(R * layer.n);
  result.grad_routing_weights = zeros(static_cast<std::int64_t>(weights.size()));
  const Matrix d_h{&result.grad_h, layer.columns}, scaled_a{&result.scaled_a, layer.n};
  for (std::int64_t r = 0; r < R; ++r) {
    const auto [position, t, e] = rows[at(r)];
    const double s = weights[at(position)];
    double d_s = 0.0;
    for (std::int64_t k = 0; k < layer.d; ++k) d_s += d_out(t, k) * layer.b2(e, k);
    for (std::int64_t j = 0; j < layer.n; ++j) {
      double d_a = 0.0;  // dA' of the page: without the weight
      for (std::int64_t k = 0; k < layer.d; ++k) d_a += d_out(t, k) * layer.w2(e, k, j);
      d_a = round(d_a);
      const ActivationValue act = layer.activate_row(h, r, j);
      d_s += d_a * round(act.value);
      d_h(r, layer.gate_column(j)) = round(s * d_a * act.d_gate);
      if (layer.gated) d_h(r, layer.up_column(j)) = round(s * d_a * act.d_up);
      scaled_a(r, j) = round(s * act.value);
    }
    result.grad_routing_weights[at(position)] = d_s;
  }
  return result;
}

BackwardResult backward_up(const Problem& problem, const std::vector<Row>& rows,
                           const Values& stored_grad_h, Storage storage) {
  const Layer layer(problem);
  const auto round = [&](double v) {
    return storage == Storage::kAll ? rounded_to(layer.dtype, v) : v;
  };
  Values grad_h_data = stored_grad_h;
  const Matrix d_h{&grad_h_data, layer.columns};

  BackwardResult result;
  result.grad_x = zeros(layer.T * layer.d);
  result.grad_w1 = zeros(layer.E * layer.columns * layer.d);
  result.grad_b1 = zeros(layer.E * layer.columns);
  const Matrix grad_x{&result.grad_x, layer.d}, grad_b1{&result.grad_b1, layer.columns};
  const Cube grad_w1{&result.grad_w1, layer.columns, layer.d};
  for (std::int64_t r = 0; r < static_cast<std::int64_t>(rows.size()); ++r) {
    const auto [position, t, e] = rows[at(r)];
    for (std::int64_t k = 0; k < layer.d; ++k) {
      double d_x = 0.0;
      for (std::int64_t c = 0; c < layer.columns; ++c) {
        d_x += d_h(r, c) * layer.w1(e, c, k);
        grad_w1(e, c, k) += d_h(r, c) * layer.x(t, k);
      }
      grad_x(t, k) += round(d_x);
    }
    for (std::int64_t c = 0; c < layer.columns; ++c) grad_b1(e, c) += d_h(r, c);
  }
  return result;
}

BackwardResult backward_down(const Problem& problem, const std::vector<Row>& rows,
                             const Values& stored_a, const ConstTensorView& grad_out) {
  const Layer layer(problem);
  const Values weights = routing_weights(problem.routing, layer.T);
  Values d_out_data = to_double(grad_out);
  Values a_data = stored_a;
  const Matrix d_out{&d_out_data, layer.d}, scaled_a{&a_data, layer.n};

  BackwardResult result;
  result.grad_w2 = zeros(layer.E * layer.d * layer.n);
  result.grad_b2 = zeros(layer.E * layer.d);
  const Matrix grad_b2{&result.grad_b2, layer.d};
  const Cube grad_w2{&result.grad_w2, layer.d, layer.n};
  for (std::int64_t r = 0; r < static_cast<std::int64_t>(rows.size()); ++r) {
    const auto [position, t, e] = rows[at(r)];
    const double s = weights[at(position)];
    for (std::int64_t k = 0; k < layer.d; ++k) {
      for (std::int64_t j = 0; j < layer.n; ++j) grad_w2(e, k, j) += d_out(t, k) * scaled_a(r, j);
      grad_b2(e, k) += s * d_out(t, k);
    }
  }
  return result;
}

BackwardResult backward(const Problem& problem, const std::vector<Row>& rows,
                        const Values& stored_h, const ConstTensorView& grad_out, Storage storage) {
  HiddenGradients hidden = backward_hidden(problem, rows, stored_h, grad_out, storage);
  BackwardResult result = backward_up(problem, rows, hidden.grad_h, storage);
  BackwardResult down = backward_down(problem, rows, hidden.scaled_a, grad_out);
  result.grad_w2 = std::move(down.grad_w2);
  result.grad_b2 = std::move(down.grad_b2);
  result.grad_routing_weights = std::move(hidden.grad_routing_weights);
  return result;
}

}  // namespace sonicmoe::oracle
