#include "oracle/experts.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numbers>

#include "sonicmoe/error.hpp"

namespace sonicmoe::oracle {
namespace {

// Row-major [rows, columns] or [batch, rows, columns] over a vector: indices as in the formulas.
struct Matrix {
  std::vector<double>* data;
  std::int64_t columns;
  double& operator()(std::int64_t i, std::int64_t j) const {
    return (*data)[static_cast<std::size_t>(i * columns + j)];
  }
};
struct Cube {
  std::vector<double>* data;
  std::int64_t rows, columns;
  double& operator()(std::int64_t b, std::int64_t i, std::int64_t j) const {
    return (*data)[static_cast<std::size_t>((b * rows + i) * columns + j)];
  }
};

std::vector<double> zeros(std::int64_t count) {
  return std::vector<double>(static_cast<std::size_t>(count), 0.0);
}

template <class T>
double read(const void* data, std::int64_t index) {
  return static_cast<double>(static_cast<const T*>(data)[index]);
}

double read_element(const ConstTensorView& view, std::int64_t offset) {
  switch (view.dtype()) {
    case DType::kFloat32:
      return read<float>(view.data(), offset);
    case DType::kBFloat16:
      return static_cast<float>(static_cast<const bfloat16*>(view.data())[offset]);
    case DType::kInt32:
      return read<std::int32_t>(view.data(), offset);
    case DType::kInt64:
      return read<std::int64_t>(view.data(), offset);
    case DType::kUInt8:
      return read<std::uint8_t>(view.data(), offset);
    case DType::kFloat16:
    case DType::kFloat64:
    case DType::kInt8:
    case DType::kInt16:
    case DType::kBool:
      break;
  }
  throw Error("oracle", "dtype", "one that operations take", std::string(name_of(view.dtype())));
}

// Element `index` of an id tensor of rank 1 or 2. Not through double: INT64_MAX has no double.
std::int64_t read_id(const ConstTensorView& ids, std::int64_t index) {
  const std::int64_t offset =
      ids.rank() == 1 ? index * ids.stride(0)
                      : index / ids.size(1) * ids.stride(0) + index % ids.size(1) * ids.stride(1);
  return ids.dtype() == DType::kInt32 ? std::int64_t{ids.as<std::int32_t>()[offset]}
                                      : ids.as<std::int64_t>()[offset];
}

// The pairs that are not dropped, in input order.
std::vector<Row> input_rows(const Routing& routing, std::int64_t num_tokens,
                            std::int64_t num_experts) {
  std::vector<Row> rows;
  const auto add = [&](std::int64_t position, std::int64_t token, std::int64_t expert) {
    const bool dropped = token < 0 || token >= num_tokens || expert < 0 || expert >= num_experts;
    if (!dropped) rows.push_back({position, token, expert});
  };
  if (const auto* top_k = std::get_if<TopKRouting>(&routing)) {
    const std::int64_t slots = top_k->topk_ids.size(1);
    for (std::int64_t p = 0; p < num_tokens * slots; ++p) {
      add(p, p / slots, read_id(top_k->topk_ids, p));
    }
  } else if (const auto* pairs = std::get_if<PairRouting>(&routing)) {
    for (std::int64_t p = 0; p < pairs->token_ids.size(0); ++p) {
      add(p, read_id(pairs->token_ids, p), read_id(pairs->expert_ids, p));
    }
  } else {
    const ConstTensorView& offsets = std::get<SortedRouting>(routing).offsets;
    std::int64_t begin = 0;
    for (std::int64_t e = 0; e < num_experts; ++e) {
      const std::int64_t end = read_id(offsets, e);
      for (std::int64_t r = begin; r < end; ++r) add(r, r, e);
      begin = std::max(begin, end);
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
  std::vector<double> x_data, w1_data, b1_data, w2_data, b2_data;
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

double sigmoid(double v) { return 1.0 / (1.0 + std::exp(-v)); }

// f(g) and f'(g) of the scalar functions, before gating.
struct Scalar {
  double value, slope;
};

Scalar silu(double g) {
  const double s = sigmoid(g);
  return {g * s, s + g * s * (1.0 - s)};
}

Scalar gelu_erf(double g) {
  const double cdf = 0.5 * std::erfc(-g / std::numbers::sqrt2);
  const double density = std::exp(-0.5 * g * g) / std::sqrt(2.0 * std::numbers::pi);
  return {g * cdf, cdf + g * density};
}

Scalar gelu_tanh(double g) {
  const double c = std::sqrt(2.0 / std::numbers::pi);
  const double t = std::tanh(c * (g + 0.044715 * g * g * g));
  const double inner_slope = c * (1.0 + 3.0 * 0.044715 * g * g);
  return {0.5 * g * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * inner_slope};
}

Scalar relu(double g) { return g > 0.0 ? Scalar{g, 1.0} : Scalar{0.0, 0.0}; }

ActivationValue gate_with(Scalar f, double up) { return {f.value * up, f.slope * up, f.value}; }

ActivationValue swiglu_clamped(double gate, double up, double limit) {
  const double g = std::min(gate, limit);
  const double u = std::clamp(up, -limit, limit);
  const double s = sigmoid(1.702 * g);
  const double swish = g * s;
  const double swish_slope = s + 1.702 * g * s * (1.0 - s);
  return {(u + 1.0) * swish, gate <= limit ? (u + 1.0) * swish_slope : 0.0,
          up >= -limit && up <= limit ? swish : 0.0};
}

}  // namespace

std::vector<double> to_double(const ConstTensorView& view) {
  std::vector<double> values;
  values.reserve(static_cast<std::size_t>(view.numel()));
  const std::int64_t count = view.numel();
  for (std::int64_t i = 0; i < count; ++i) {
    std::int64_t rest = i;
    std::int64_t offset = 0;
    for (int dim = view.rank() - 1; dim >= 0; --dim) {
      offset += rest % view.size(dim) * view.stride(dim);
      rest /= view.size(dim);
    }
    values.push_back(read_element(view, offset));
  }
  return values;
}

double rounded_to(DType dtype, double value) {
  const float single = static_cast<float>(value);
  return dtype == DType::kBFloat16 ? static_cast<float>(bfloat16(single)) : single;
}

std::vector<Row> sorted_rows(const Routing& routing, std::int64_t num_tokens,
                             std::int64_t num_experts) {
  std::vector<Row> rows = input_rows(routing, num_tokens, num_experts);
  std::stable_sort(rows.begin(), rows.end(),
                   [](const Row& a, const Row& b) { return a.expert < b.expert; });
  return rows;
}

std::vector<double> routing_weights(const Routing& routing, std::int64_t num_pairs) {
  const ConstTensorView& view = weights_view(routing);
  if (!view.defined()) return std::vector<double>(static_cast<std::size_t>(num_pairs), 1.0);
  return to_double(view);
}

ActivationValue activate(const ExpertOptions& options, double gate, double up) {
  switch (options.activation) {
    case Activation::kSwiGLU:
      return gate_with(silu(gate), up);
    case Activation::kGeGLU:
      return gate_with(gelu_erf(gate), up);
    case Activation::kGeGLUTanh:
      return gate_with(gelu_tanh(gate), up);
    case Activation::kReGLU:
      return gate_with(relu(gate), up);
    case Activation::kSwiGLUClamped:
      return swiglu_clamped(gate, up, options.limit);
    case Activation::kSiLU:
      return {silu(gate).value, silu(gate).slope, 0.0};
    case Activation::kGELU:
      return {gelu_erf(gate).value, gelu_erf(gate).slope, 0.0};
    case Activation::kGELUTanh:
      return {gelu_tanh(gate).value, gelu_tanh(gate).slope, 0.0};
    case Activation::kReLU:
      return {relu(gate).value, relu(gate).slope, 0.0};
    case Activation::kReLUSquared:
      return {relu(gate).value * relu(gate).value, 2.0 * relu(gate).value, 0.0};
  }
  return {};
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
  result.rows = sorted_rows(problem.routing, layer.T, layer.E);
  const auto R = static_cast<std::int64_t>(result.rows.size());
  const std::vector<double> weights = routing_weights(problem.routing, layer.T);
  result.h = zeros(R * layer.columns);
  result.a = zeros(R * layer.n);
  result.out = zeros(layer.T * layer.d);
  const Matrix h{&result.h, layer.columns}, a{&result.a, layer.n}, out{&result.out, layer.d};

  for (std::int64_t r = 0; r < R; ++r) {
    const auto [position, t, e] = result.rows[static_cast<std::size_t>(r)];
    const double s = weights[static_cast<std::size_t>(position)];
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

BackwardResult backward(const Problem& problem, const std::vector<Row>& rows,
                        const std::vector<double>& stored_h, const ConstTensorView& grad_out,
                        Storage storage) {
  const Layer layer(problem);
  const auto round = [&](double v) {
    return storage == Storage::kAll ? rounded_to(layer.dtype, v) : v;
  };
  const std::vector<double> weights = routing_weights(problem.routing, layer.T);
  std::vector<double> d_out_data = to_double(grad_out);
  std::vector<double> h_data = stored_h;
  const Matrix d_out{&d_out_data, layer.d}, h{&h_data, layer.columns};

  BackwardResult result;
  result.grad_x = zeros(layer.T * layer.d);
  result.grad_w1 = zeros(layer.E * layer.columns * layer.d);
  result.grad_b1 = zeros(layer.E * layer.columns);
  result.grad_w2 = zeros(layer.E * layer.d * layer.n);
  result.grad_b2 = zeros(layer.E * layer.d);
  result.grad_routing_weights = zeros(static_cast<std::int64_t>(weights.size()));
  const Matrix grad_x{&result.grad_x, layer.d}, grad_b1{&result.grad_b1, layer.columns},
      grad_b2{&result.grad_b2, layer.d};
  const Cube grad_w1{&result.grad_w1, layer.columns, layer.d},
      grad_w2{&result.grad_w2, layer.d, layer.n};

  std::vector<double> d_h = zeros(layer.columns);  // dH of one row
  for (std::size_t index = 0; index < rows.size(); ++index) {
    const auto [position, t, e] = rows[index];
    const auto r = static_cast<std::int64_t>(index);
    const double s = weights[static_cast<std::size_t>(position)];

    double d_s = 0.0;
    for (std::int64_t k = 0; k < layer.d; ++k) d_s += d_out(t, k) * layer.b2(e, k);
    for (std::int64_t j = 0; j < layer.n; ++j) {
      double d_a = 0.0;  // dA' of the page: without the weight
      for (std::int64_t k = 0; k < layer.d; ++k) d_a += d_out(t, k) * layer.w2(e, k, j);
      d_a = round(d_a);
      const ActivationValue act = layer.activate_row(h, r, j);
      d_s += d_a * round(act.value);
      d_h[static_cast<std::size_t>(layer.gate_column(j))] = round(s * d_a * act.d_gate);
      if (layer.gated) {
        d_h[static_cast<std::size_t>(layer.up_column(j))] = round(s * d_a * act.d_up);
      }
      const double weighted_a = round(s * act.value);  // A'
      for (std::int64_t k = 0; k < layer.d; ++k) grad_w2(e, k, j) += d_out(t, k) * weighted_a;
    }
    result.grad_routing_weights[static_cast<std::size_t>(position)] = d_s;

    for (std::int64_t k = 0; k < layer.d; ++k) {
      double d_x = 0.0;
      for (std::int64_t c = 0; c < layer.columns; ++c) {
        d_x += d_h[static_cast<std::size_t>(c)] * layer.w1(e, c, k);
        grad_w1(e, c, k) += d_h[static_cast<std::size_t>(c)] * layer.x(t, k);
      }
      grad_x(t, k) += round(d_x);
      grad_b2(e, k) += s * d_out(t, k);
    }
    for (std::int64_t c = 0; c < layer.columns; ++c) {
      grad_b1(e, c) += d_h[static_cast<std::size_t>(c)];
    }
  }
  return result;
}

std::vector<double> router_logits(const ConstTensorView& x, const ConstTensorView& weight,
                                  const ConstTensorView& bias) {
  const std::int64_t T = x.size(0), d = x.size(1), E = weight.size(0);
  std::vector<double> x_data = to_double(x), w_data = to_double(weight);
  const std::vector<double> b = bias.defined() ? to_double(bias) : zeros(E);
  const Matrix xm{&x_data, d}, wm{&w_data, d};
  std::vector<double> logits = zeros(T * E);
  for (std::int64_t t = 0; t < T; ++t) {
    for (std::int64_t e = 0; e < E; ++e) {
      double sum = b[static_cast<std::size_t>(e)];
      for (std::int64_t k = 0; k < d; ++k) sum += xm(t, k) * wm(e, k);
      logits[static_cast<std::size_t>(t * E + e)] = sum;
    }
  }
  return logits;
}

std::vector<double> router_grad_x(const std::vector<double>& grad_logits,
                                  const ConstTensorView& weight) {
  const std::int64_t E = weight.size(0), d = weight.size(1);
  const std::int64_t T = static_cast<std::int64_t>(grad_logits.size()) / E;
  std::vector<double> w_data = to_double(weight);
  const Matrix wm{&w_data, d};
  std::vector<double> result = zeros(T * d);
  const Matrix grad_x{&result, d};
  for (std::int64_t t = 0; t < T; ++t) {
    for (std::int64_t e = 0; e < E; ++e) {
      const double g = grad_logits[static_cast<std::size_t>(t * E + e)];
      for (std::int64_t k = 0; k < d; ++k) grad_x(t, k) += g * wm(e, k);
    }
  }
  return result;
}

RouterGradients router_gradients(const std::vector<double>& grad_logits, std::int64_t num_experts,
                                 const ConstTensorView& x) {
  const std::int64_t T = x.size(0), d = x.size(1), E = num_experts;
  std::vector<double> x_data = to_double(x);
  const Matrix xm{&x_data, d};
  RouterGradients result{zeros(E * d), zeros(E)};
  const Matrix grad_weight{&result.weight, d};
  for (std::int64_t t = 0; t < T; ++t) {
    for (std::int64_t e = 0; e < E; ++e) {
      const double g = grad_logits[static_cast<std::size_t>(t * E + e)];
      result.bias[static_cast<std::size_t>(e)] += g;
      for (std::int64_t k = 0; k < d; ++k) grad_weight(e, k) += g * xm(t, k);
    }
  }
  return result;
}

}  // namespace sonicmoe::oracle
