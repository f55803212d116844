// Offsets beyond 2^31 elements: R*d (Y and dX~ of fine-grained layers) and E*2n*d (W1 and dW1 of
// wide ones). The last rows and experts are compared with float64 sums over what they need. On GPUs
// only: a CPU takes minutes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <numeric>
#include <vector>

#include "oracle/activation.hpp"
#include "oracle/experts.hpp"
#include "oracle/router.hpp"
#include "rig/random.hpp"
#include "rig/target.hpp"
#include "rig/tensor.hpp"
#include "sonicmoe/backend.hpp"
#include "sonicmoe/moe.hpp"

namespace sonicmoe::rig {
namespace {

constexpr std::size_t kPeriod = 4194301;  // a prime: no two rows start at the same place of it

// `shape` on a target, filled with poison or with normal numbers that repeat with kPeriod, which
// the host can therefore look up.
class LargeTensor {
 public:
  LargeTensor(const Target& target, DType dtype, std::vector<std::int64_t> extents)
      : target_(target) {
    bytes_ = size_of(dtype);
    for (const std::int64_t extent : extents) bytes_ *= static_cast<std::size_t>(extent);
    data_ = static_cast<std::byte*>(target.memory->allocate(bytes_));
    view = TensorView(data_, dtype, std::span<const std::int64_t>(extents), target.device);
    repeat(poison(std::size_t{1} << 24));
  }
  LargeTensor(const Target& target, std::vector<std::int64_t> extents, double scale,
              std::uint64_t seed)
      : LargeTensor(target, DType::kBFloat16, std::move(extents)) {
    Random random(seed);
    values_.reserve(kPeriod);
    for (std::size_t i = 0; i < kPeriod; ++i) {
      values_.push_back(bfloat16(static_cast<float>(scale * random.normal())));
    }
    std::vector<std::byte> period(kPeriod * sizeof(bfloat16));
    std::memcpy(period.data(), values_.data(), period.size());
    repeat(period);
  }
  ~LargeTensor() { target_.memory->release(data_, bytes_); }
  LargeTensor(const LargeTensor&) = delete;
  LargeTensor& operator=(const LargeTensor&) = delete;

  /// Element i as filled.
  bfloat16 filled(std::int64_t i) const { return values_[static_cast<std::size_t>(i) % kPeriod]; }
  std::vector<bfloat16> filled(std::int64_t first, std::int64_t count) const {
    std::vector<bfloat16> result;
    for (std::int64_t i = first; i < first + count; ++i) result.push_back(filled(i));
    return result;
  }

  template <class T>
  void upload(const std::vector<T>& values) {
    target_.memory->upload(data_, values.data(), values.size() * sizeof(T));
  }
  /// `count` elements from element `first` on, as they are now.
  std::vector<double> values(std::int64_t first, std::int64_t count) const {
    const std::size_t element = size_of(view.dtype());
    std::vector<std::byte> raw(static_cast<std::size_t>(count) * element);
    target_.memory->download(raw.data(), data_ + static_cast<std::size_t>(first) * element,
                             raw.size());
    return oracle::to_double(ConstTensorView(raw.data(), view.dtype(), {count}));
  }

  TensorView view;

 private:
  void repeat(const std::vector<std::byte>& pattern) {
    for (std::size_t at = 0; at < bytes_; at += pattern.size()) {
      target_.memory->upload(data_ + at, pattern.data(), std::min(pattern.size(), bytes_ - at));
    }
  }

  const Target& target_;
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
  std::vector<bfloat16> values_;
};

// Errors stay below a few bfloat16 roundings; zeros or another row's values are far beyond.
void expect_close(const std::string& name, const std::vector<double>& actual,
                  const std::vector<double>& expected) {
  ASSERT_EQ(actual.size(), expected.size()) << name;
  double scale = 0.0;
  for (const double value : expected) scale = std::max(scale, std::abs(value));
  ASSERT_GT(scale, 0.0) << name;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    ASSERT_LE(std::abs(actual[i] - expected[i]), 0.02 * scale)
        << name << ": element " << i << " of " << actual.size() << " is " << actual[i]
        << ", expected " << expected[i];
  }
}

struct Sizes {
  std::int64_t T, d, n, E, K;
};

// A layer with top-K routing given slot by slot.
struct Layer {
  Sizes s;
  std::vector<std::int32_t> ids;
  std::vector<float> weight;
  LargeTensor x, grad_out, w1, w2, topk_ids, topk_weights, out, h, metadata, grad_x, grad_w1,
      grad_w2, grad_weights, workspace;

  Layer(const Target& target, Sizes sizes, std::vector<std::int32_t> slots)
      : s(sizes),
        ids(std::move(slots)),
        x(target, {s.T, s.d}, 1.0, 1),
        grad_out(target, {s.T, s.d}, 1.0, 2),
        w1(target, {s.E, 2 * s.n, s.d}, 1.0 / std::sqrt(static_cast<double>(s.d)), 3),
        w2(target, {s.E, s.d, s.n}, 1.0 / std::sqrt(static_cast<double>(s.n)), 4),
        topk_ids(target, DType::kInt32, {s.T, s.K}),
        topk_weights(target, DType::kFloat32, {s.T, s.K}),
        out(target, DType::kBFloat16, {s.T, s.d}),
        h(target, DType::kBFloat16, {s.T * s.K, 2 * s.n}),
        metadata(target, DType::kUInt8, {bytes(moe_metadata_bytes(shape()))}),
        grad_x(target, DType::kBFloat16, {s.T, s.d}),
        grad_w1(target, DType::kBFloat16, {s.E, 2 * s.n, s.d}),
        grad_w2(target, DType::kBFloat16, {s.E, s.d, s.n}),
        grad_weights(target, DType::kFloat32, {s.T, s.K}),
        workspace(target, DType::kUInt8,
                  {bytes(std::max(moe_forward_workspace(target.context(), shape()).bytes,
                                  moe_backward_workspace(target.context(), shape()).bytes))}) {
    for (std::size_t i = 0; i < ids.size(); ++i) {
      weight.push_back(0.25f + 0.5f * static_cast<float>(i % 3));
    }
    topk_ids.upload(ids);
    topk_weights.upload(weight);
    run(target.context());
  }

  static std::int64_t bytes(std::size_t count) { return static_cast<std::int64_t>(count); }
  ExpertWeights weights() const { return {w1.view, {}, w2.view, {}}; }
  Routing routing() const { return TopKRouting{topk_ids.view, topk_weights.view}; }
  MoEShape shape() const { return moe_shape({}, x.view, weights(), routing()); }

  void run(const Context& context) {
    MoEForwardArgs forward;
    forward.x = x.view;
    forward.weights = weights();
    forward.routing = routing();
    forward.out = out.view;
    forward.h = h.view;
    forward.metadata = metadata.view;
    forward.workspace = workspace.view;
    moe_forward(context, forward);
    MoEBackwardArgs backward;
    backward.grad_out = grad_out.view;
    backward.x = x.view;
    backward.weights = weights();
    backward.routing = routing();
    backward.h = h.view;
    backward.metadata = metadata.view;
    backward.grad_x = grad_x.view;
    backward.grad_w1 = grad_w1.view;
    backward.grad_w2 = grad_w2.view;
    backward.grad_routing_weights = grad_weights.view;
    backward.workspace = workspace.view;
    moe_backward(context, backward);
  }

  /// The position t*K + k of every row of H.
  std::vector<std::int64_t> positions() const {
    std::vector<std::int64_t> result(ids.size());
    std::iota(result.begin(), result.end(), 0);
    std::stable_sort(result.begin(), result.end(), [&](std::int64_t a, std::int64_t b) {
      return ids[static_cast<std::size_t>(a)] < ids[static_cast<std::size_t>(b)];
    });
    return result;
  }
};

// Some tokens of a layer with the experts they use, renumbered in ascending order: what the oracle
// computes from.
struct Sample {
  std::vector<std::int64_t> tokens;
  std::vector<std::int32_t> experts;  // by their new number
  std::vector<bfloat16> x, grad_out, w1, w2;
  std::vector<std::int32_t> ids;
  std::vector<float> weight;
  Sizes s;

  Sample(const Layer& layer, std::vector<std::int64_t> chosen)
      : tokens(std::move(chosen)), s(layer.s) {
    std::map<std::int32_t, std::int32_t> numbers;
    for (const std::int64_t t : tokens) {
      for (std::int64_t k = 0; k < s.K; ++k) numbers[id_of(layer, t, k)] = 0;
    }
    for (auto& [expert, number] : numbers) {
      number = static_cast<std::int32_t>(experts.size());
      experts.push_back(expert);
      append(w1, layer.w1.filled(expert * 2 * s.n * s.d, 2 * s.n * s.d));
      append(w2, layer.w2.filled(expert * s.d * s.n, s.d * s.n));
    }
    for (const std::int64_t t : tokens) {
      append(x, layer.x.filled(t * s.d, s.d));
      append(grad_out, layer.grad_out.filled(t * s.d, s.d));
      for (std::int64_t k = 0; k < s.K; ++k) {
        ids.push_back(numbers[id_of(layer, t, k)]);
        weight.push_back(layer.weight[static_cast<std::size_t>(t * s.K + k)]);
      }
    }
    s.T = static_cast<std::int64_t>(tokens.size());
    s.E = static_cast<std::int64_t>(experts.size());
  }

  oracle::Problem problem() const {
    ExpertWeights weights;
    weights.w1 = ConstTensorView(w1.data(), DType::kBFloat16, {s.E, 2 * s.n, s.d});
    weights.w2 = ConstTensorView(w2.data(), DType::kBFloat16, {s.E, s.d, s.n});
    return {{},
            ConstTensorView(x.data(), DType::kBFloat16, {s.T, s.d}),
            weights,
            TopKRouting{ConstTensorView(ids.data(), DType::kInt32, {s.T, s.K}),
                        ConstTensorView(weight.data(), DType::kFloat32, {s.T, s.K})}};
  }

  /// Compares out, H, dX and dS of the sampled tokens. Returns the oracle's gradients.
  oracle::BackwardResult compare(const Layer& layer) const {
    const oracle::ForwardResult forward = oracle::forward(problem());
    const std::vector<double> h = stored_h(layer, forward.rows);
    const oracle::BackwardResult backward = oracle::backward(
        problem(), forward.rows, h, ConstTensorView(grad_out.data(), DType::kBFloat16, {s.T, s.d}));
    expect_close("h", h, forward.h);
    expect_close("out", rows_of(layer.out, s.d), forward.out);
    expect_close("grad_x", rows_of(layer.grad_x, s.d), backward.grad_x);
    expect_close("grad_routing_weights", rows_of(layer.grad_weights, s.K),
                 backward.grad_routing_weights);
    return backward;
  }

 private:
  static std::int32_t id_of(const Layer& layer, std::int64_t t, std::int64_t k) {
    return layer.ids[static_cast<std::size_t>(t * layer.s.K + k)];
  }
  template <class T>
  static void append(std::vector<T>& to, const std::vector<T>& from) {
    to.insert(to.end(), from.begin(), from.end());
  }
  std::vector<double> rows_of(const LargeTensor& tensor, std::int64_t width) const {
    std::vector<double> result;
    for (const std::int64_t t : tokens) append(result, tensor.values(t * width, width));
    return result;
  }
  std::vector<double> stored_h(const Layer& layer, const std::vector<oracle::Row>& rows) const {
    const std::vector<std::int64_t> positions = layer.positions();
    std::vector<std::int64_t> row_of(positions.size());
    for (std::size_t r = 0; r < positions.size(); ++r) {
      row_of[static_cast<std::size_t>(positions[r])] = static_cast<std::int64_t>(r);
    }
    std::vector<double> h;
    for (const oracle::Row& row : rows) {
      const std::int64_t position =
          tokens[static_cast<std::size_t>(row.token)] * s.K + row.position % s.K;
      append(h, layer.h.values(row_of[static_cast<std::size_t>(position)] * 2 * s.n, 2 * s.n));
    }
    return h;
  }
};

// dW1 and dW2 of one hidden unit of one expert, over all rows of the expert.
void compare_unit(const Layer& layer, std::int32_t expert, std::int64_t unit) {
  const auto [T, d, n, E, K] = layer.s;
  std::vector<double> gate(static_cast<std::size_t>(d), 0.0), up = gate, down = gate;
  const std::vector<std::int64_t> positions = layer.positions();
  for (std::size_t r = 0; r < positions.size(); ++r) {
    const auto p = static_cast<std::size_t>(positions[r]);
    if (layer.ids[p] != expert) continue;
    const std::int64_t t = positions[r] / K;
    const std::vector<double> h = layer.h.values(static_cast<std::int64_t>(r) * 2 * n, 2 * n);
    double grad_a = 0.0;
    for (std::int64_t c = 0; c < d; ++c) {
      grad_a += static_cast<double>(layer.grad_out.filled(t * d + c)) *
                static_cast<double>(layer.w2.filled((expert * d + c) * n + unit));
    }
    const auto a = oracle::activate({}, h[static_cast<std::size_t>(unit)],
                                    h[static_cast<std::size_t>(n + unit)]);
    const double s = layer.weight[p];
    for (std::int64_t c = 0; c < d; ++c) {
      const auto i = static_cast<std::size_t>(c);
      const double x = layer.x.filled(t * d + c);
      gate[i] += s * grad_a * a.d_gate * x;
      up[i] += s * grad_a * a.d_up * x;
      down[i] += s * a.value * static_cast<double>(layer.grad_out.filled(t * d + c));
    }
  }
  const std::int64_t first = expert * 2 * n * d;
  expect_close("grad_w1, gate", layer.grad_w1.values(first + unit * d, d), gate);
  expect_close("grad_w1, up", layer.grad_w1.values(first + (n + unit) * d, d), up);
  std::vector<double> column;
  const std::vector<double> block = layer.grad_w2.values(expert * d * n, d * n);
  for (std::int64_t c = 0; c < d; ++c) {
    column.push_back(block[static_cast<std::size_t>(c * n + unit)]);
  }
  expect_close("grad_w2", column, down);
}

class Large : public ::testing::TestWithParam<Target> {
 protected:
  // Whether the test has to be skipped.
  bool lacks(double gib) const {
    if (GetParam().device.type != DeviceType::kCuda) return true;
    for (const DeviceInfo& info : devices()) {
      if (info.device.type == DeviceType::kCuda) {
        return static_cast<double>(info.memory_bytes) < gib * 0x1p30;
      }
    }
    return true;
  }
};
INSTANTIATE_TEST_SUITE_P(Backends, Large, ::testing::ValuesIn(targets()),
                         [](const auto& test) { return test.param.backend; });

TEST_P(Large, LastRowsPast2To31Elements) {
  if (lacks(16)) GTEST_SKIP() << "needs a GPU with 16 GiB";
  const Sizes s{33024, 4096, 64, 32, 16};
  ASSERT_GT(s.T * s.K * s.d, std::int64_t{1} << 31);
  std::vector<std::int32_t> ids;
  for (std::int64_t p = 0; p < s.T * s.K; ++p) {
    ids.push_back(static_cast<std::int32_t>((p / s.K + 2 * (p % s.K)) % s.E));
  }
  const Layer layer(GetParam(), s, std::move(ids));
  ASSERT_EQ(layer.positions().back() / s.K, s.T - 1);  // the last row is of the last token
  Sample(layer, {0, s.T / 2, s.T - 2, s.T - 1}).compare(layer);
  compare_unit(layer, 31, 63);
}

TEST_P(Large, LastExpertsPast2To31Elements) {
  if (lacks(24)) GTEST_SKIP() << "needs a GPU with 24 GiB";
  const Sizes s{16, 4096, 1024, 260, 2};
  ASSERT_GT((s.E - 2) * 2 * s.n * s.d, std::int64_t{1} << 31);
  std::vector<std::int32_t> ids;
  for (std::int64_t t = 0; t < s.T; ++t) {
    ids.push_back(static_cast<std::int32_t>(s.E - 1 - t % 2));
    ids.push_back(static_cast<std::int32_t>(t % 3));
  }
  const Layer layer(GetParam(), s, std::move(ids));
  std::vector<std::int64_t> all(static_cast<std::size_t>(s.T));
  std::iota(all.begin(), all.end(), 0);
  const Sample sample(layer, all);
  const oracle::BackwardResult expected = sample.compare(layer);
  const std::int64_t w1 = 2 * s.n * s.d, w2 = s.d * s.n;
  for (std::size_t e = 0; e < sample.experts.size(); ++e) {
    SCOPED_TRACE("expert " + std::to_string(sample.experts[e]));
    const auto part = [&](const std::vector<double>& all_experts, std::int64_t size) {
      const auto begin = all_experts.begin() + static_cast<std::int64_t>(e) * size;
      return std::vector<double>(begin, begin + size);
    };
    expect_close("grad_w1", layer.grad_w1.values(sample.experts[e] * w1, w1),
                 part(expected.grad_w1, w1));
    expect_close("grad_w2", layer.grad_w2.values(sample.experts[e] * w2, w2),
                 part(expected.grad_w2, w2));
  }
  for (const std::int64_t unused : {std::int64_t{200}, s.E - 3}) {
    const std::vector<double> zeros = layer.grad_w1.values(unused * w1, w1);
    EXPECT_EQ(std::count(zeros.begin(), zeros.end(), 0.0), w1) << "expert " << unused;
  }
}

}  // namespace
}  // namespace sonicmoe::rig
