#include "rig/naive.hpp"

#include <algorithm>
#include <cmath>
#include <functional>

#include "oracle/activation.hpp"

namespace sonicmoe::rig {
namespace {

using oracle::Row;

std::vector<float> to_float(const std::vector<double>& values) {
  return {values.begin(), values.end()};
}
std::vector<double> to_double(const std::vector<float>& values) {
  return {values.begin(), values.end()};
}
std::vector<float> floats(std::int64_t count) {
  return std::vector<float>(static_cast<std::size_t>(count), 0.0f);
}

float stored(DType dtype, float value) {
  return dtype == DType::kBFloat16 ? static_cast<float>(bfloat16(value)) : value;
}
void round_all(DType dtype, std::vector<float>& values) {
  for (float& value : values) value = stored(dtype, value);
}

// Extents, float copies of the inputs and row-major access.
struct Inputs {
  std::int64_t T, d, n, E, columns;
  DType dtype;
  ExpertOptions options;
  std::vector<float> x, w1, b1, w2, b2, weights;

  explicit Inputs(const oracle::Problem& p)
      : T(p.x.size(0)),
        d(p.x.size(1)),
        n(p.weights.w2.size(2)),
        E(p.weights.w1.size(0)),
        columns(p.weights.w1.size(1)),
        dtype(p.x.dtype()),
        options(p.options),
        x(to_float(oracle::to_double(p.x))),
        w1(to_float(oracle::to_double(p.weights.w1))),
        b1(p.weights.b1.defined() ? to_float(oracle::to_double(p.weights.b1))
                                  : floats(E * columns)),
        w2(to_float(oracle::to_double(p.weights.w2))),
        b2(p.weights.b2.defined() ? to_float(oracle::to_double(p.weights.b2)) : floats(E * d)),
        weights(to_float(oracle::routing_weights(p.routing, T))) {}

  bool gated() const { return is_gated(options.activation); }
  std::int64_t gate(std::int64_t j) const {
    return gated() && options.gate_up_layout == GateUpLayout::kInterleaved ? 2 * j : j;
  }
  std::int64_t up(std::int64_t j) const {
    return options.gate_up_layout == GateUpLayout::kInterleaved ? 2 * j + 1 : n + j;
  }
};

template <class T>
T& at(std::vector<T>& v, std::int64_t i) {
  return v[static_cast<std::size_t>(i)];
}
template <class T>
const T& at(const std::vector<T>& v, std::int64_t i) {
  return v[static_cast<std::size_t>(i)];
}

oracle::ActivationOf<float> activate_at(const Inputs& in, const std::vector<float>& h,
                                        std::int64_t row, std::int64_t j) {
  const float up = in.gated() ? at(h, row * in.columns + in.up(j)) : 0.0f;
  return oracle::activate_in_float(in.options, at(h, row * in.columns + in.gate(j)), up);
}

}  // namespace

oracle::ForwardResult naive_forward(const oracle::Problem& problem) {
  const Inputs in(problem);
  oracle::ForwardResult result;
  result.rows = oracle::rows_of(problem);
  const auto R = static_cast<std::int64_t>(result.rows.size());
  std::vector<float> h = floats(R * in.columns), a = floats(R * in.n), out = floats(in.T * in.d);
  for (std::int64_t r = 0; r < R; ++r) {
    const auto [position, t, e] = at(result.rows, r);
    for (std::int64_t c = 0; c < in.columns; ++c) {
      float sum = 0.0f;
      for (std::int64_t k = 0; k < in.d; ++k) {
        sum += at(in.x, t * in.d + k) * at(in.w1, (e * in.columns + c) * in.d + k);
      }
      at(h, r * in.columns + c) = stored(in.dtype, sum + at(in.b1, e * in.columns + c));
    }
    for (std::int64_t j = 0; j < in.n; ++j) {
      at(a, r * in.n + j) = stored(in.dtype, activate_at(in, h, r, j).value);
    }
    for (std::int64_t k = 0; k < in.d; ++k) {
      float y = 0.0f;
      for (std::int64_t j = 0; j < in.n; ++j) {
        y += at(a, r * in.n + j) * at(in.w2, (e * in.d + k) * in.n + j);
      }
      y = stored(in.dtype, y + at(in.b2, e * in.d + k));
      at(out, t * in.d + k) += at(in.weights, position) * y;
    }
  }
  round_all(in.dtype, out);
  result.h = to_double(h);
  result.a = to_double(a);
  result.out = to_double(out);
  return result;
}

oracle::BackwardResult naive_backward(const oracle::Problem& problem, const std::vector<Row>& rows,
                                      const std::vector<double>& stored_h,
                                      const ConstTensorView& grad_out, DType gradient_dtype) {
  const Inputs in(problem);
  const std::vector<float> h = to_float(stored_h), d_out = to_float(oracle::to_double(grad_out));
  std::vector<float> grad_x = floats(in.T * in.d), grad_w1 = floats(in.E * in.columns * in.d),
                     grad_b1 = floats(in.E * in.columns), grad_w2 = floats(in.E * in.d * in.n),
                     grad_b2 = floats(in.E * in.d),
                     grad_weights = floats(static_cast<std::int64_t>(in.weights.size())),
                     d_h = floats(in.columns);
  for (std::size_t index = 0; index < rows.size(); ++index) {
    const auto [position, t, e] = rows[index];
    const auto r = static_cast<std::int64_t>(index);
    const float s = at(in.weights, position);
    float d_s = 0.0f;
    for (std::int64_t j = 0; j < in.n; ++j) {
      float d_a = 0.0f;
      for (std::int64_t k = 0; k < in.d; ++k) {
        d_a += at(d_out, t * in.d + k) * at(in.w2, (e * in.d + k) * in.n + j);
      }
      d_a = stored(in.dtype, d_a);
      const auto act = activate_at(in, h, r, j);
      d_s += d_a * stored(in.dtype, act.value);
      at(d_h, in.gate(j)) = stored(in.dtype, s * d_a * act.d_gate);
      if (in.gated()) at(d_h, in.up(j)) = stored(in.dtype, s * d_a * act.d_up);
      const float weighted_a = stored(in.dtype, s * act.value);
      for (std::int64_t k = 0; k < in.d; ++k) {
        at(grad_w2, (e * in.d + k) * in.n + j) += at(d_out, t * in.d + k) * weighted_a;
      }
    }
    for (std::int64_t k = 0; k < in.d; ++k) {
      d_s += at(d_out, t * in.d + k) * at(in.b2, e * in.d + k);
      at(grad_b2, e * in.d + k) += s * at(d_out, t * in.d + k);
      float d_x = 0.0f;
      for (std::int64_t c = 0; c < in.columns; ++c) {
        const std::int64_t w = (e * in.columns + c) * in.d + k;
        d_x += at(d_h, c) * at(in.w1, w);
        at(grad_w1, w) += at(d_h, c) * at(in.x, t * in.d + k);
      }
      at(grad_x, t * in.d + k) += stored(in.dtype, d_x);
    }
    for (std::int64_t c = 0; c < in.columns; ++c) at(grad_b1, e * in.columns + c) += at(d_h, c);
    at(grad_weights, position) = d_s;
  }
  round_all(in.dtype, grad_x);
  for (auto* gradient : {&grad_w1, &grad_b1, &grad_w2, &grad_b2}) {
    round_all(gradient_dtype, *gradient);
  }
  return {to_double(grad_x),  to_double(grad_w1), to_double(grad_b1),
          to_double(grad_w2), to_double(grad_b2), to_double(grad_weights)};
}

namespace {

double largest(const std::vector<double>& values) {
  double result = 0.0;
  for (const double value : values) result = std::max(result, std::abs(value));
  return result;
}

std::vector<double> absolute(std::vector<double> values) {
  for (double& value : values) value = std::abs(value);
  return values;
}

}  // namespace

Magnitudes magnitudes(const oracle::Problem& problem, const std::vector<Row>& rows,
                      const std::vector<double>& h, const ConstTensorView& grad_out) {
  const Inputs in(problem);
  const auto zeros = [](std::int64_t count) {
    return std::vector<double>(static_cast<std::size_t>(count), 0.0);
  };
  const std::vector<double> d_out = absolute(oracle::to_double(grad_out));
  std::vector<double> out = zeros(in.T * in.d), grad_x = zeros(in.T * in.d),
                      grad_w1 = zeros(in.E * in.columns * in.d), grad_b1 = zeros(in.E * in.columns),
                      grad_w2 = zeros(in.E * in.d * in.n), grad_b2 = zeros(in.E * in.d),
                      h_sum = zeros(in.columns), d_h = zeros(in.columns);
  Magnitudes result;
  for (std::size_t index = 0; index < rows.size(); ++index) {
    const auto [position, t, e] = rows[index];
    const auto r = static_cast<std::int64_t>(index);
    const double s = std::abs(at(in.weights, position));
    for (std::int64_t c = 0; c < in.columns; ++c) {
      double sum = std::abs(at(in.b1, e * in.columns + c));
      for (std::int64_t k = 0; k < in.d; ++k) {
        sum += std::abs(at(in.x, t * in.d + k) * at(in.w1, (e * in.columns + c) * in.d + k));
      }
      at(h_sum, c) = sum;
      result.h = std::max(result.h, sum);
    }
    std::vector<double> a_sum = zeros(in.n);
    double d_s = 0.0;
    for (std::int64_t k = 0; k < in.d; ++k) {
      d_s += at(d_out, t * in.d + k) * std::abs(at(in.b2, e * in.d + k));
    }
    for (std::int64_t j = 0; j < in.n; ++j) {
      const auto act = oracle::activate(in.options, at(h, r * in.columns + in.gate(j)),
                                        in.gated() ? at(h, r * in.columns + in.up(j)) : 0.0);
      at(a_sum, j) = std::abs(act.value) + std::abs(act.d_gate) * at(h_sum, in.gate(j)) +
                     (in.gated() ? std::abs(act.d_up) * at(h_sum, in.up(j)) : 0.0);
      double d_a = 0.0;
      for (std::int64_t k = 0; k < in.d; ++k) {
        d_a += at(d_out, t * in.d + k) * std::abs(at(in.w2, (e * in.d + k) * in.n + j));
        at(grad_w2, (e * in.d + k) * in.n + j) += at(d_out, t * in.d + k) * s * std::abs(act.value);
      }
      d_s += d_a * std::abs(act.value);
      at(d_h, in.gate(j)) = s * d_a * std::abs(act.d_gate);
      if (in.gated()) at(d_h, in.up(j)) = s * d_a * std::abs(act.d_up);
    }
    result.grad_routing_weights = std::max(result.grad_routing_weights, d_s);
    for (std::int64_t k = 0; k < in.d; ++k) {
      double y = std::abs(at(in.b2, e * in.d + k));
      for (std::int64_t j = 0; j < in.n; ++j) {
        y += at(a_sum, j) * std::abs(at(in.w2, (e * in.d + k) * in.n + j));
      }
      at(out, t * in.d + k) += s * y;
      at(grad_b2, e * in.d + k) += s * at(d_out, t * in.d + k);
      for (std::int64_t c = 0; c < in.columns; ++c) {
        const std::int64_t w = (e * in.columns + c) * in.d + k;
        at(grad_x, t * in.d + k) += at(d_h, c) * std::abs(at(in.w1, w));
        at(grad_w1, w) += at(d_h, c) * std::abs(at(in.x, t * in.d + k));
      }
    }
    for (std::int64_t c = 0; c < in.columns; ++c) at(grad_b1, e * in.columns + c) += at(d_h, c);
  }
  result.out = largest(out);
  result.grad_x = largest(grad_x);
  result.grad_w1 = largest(grad_w1);
  result.grad_b1 = largest(grad_b1);
  result.grad_w2 = largest(grad_w2);
  result.grad_b2 = largest(grad_b2);
  return result;
}

}  // namespace sonicmoe::rig
