// The router's matrix products on every target, against float64.
#include "layer/composed_backend.hpp"
#include "ops/router_fixture.hpp"

namespace sonicmoe::rig {
namespace {

class RouterProducts : public RouterTest {};
INSTANTIATE_TEST_SUITE_P(Targets, RouterProducts, ::testing::ValuesIn(targets()), target_name);

Tensor output(const Target& target, DType dtype, std::vector<std::int64_t> shape) {
  return Tensor(target, dtype, std::move(shape));
}

// Every backend of this library makes its layer of parts.
const ComposedBackend& parts_of(const Context& context) {
  return dynamic_cast<const ComposedBackend&>(choose_backend(context, "test"));
}

void expect_output(const Tensor& tensor) { EXPECT_EQ(tensor.violation_as_output(), ""); }

struct ProductCase {
  std::int64_t num_tokens, hidden_size, num_experts;
  DType x, weight;
  bool bias;
  bool accumulate;
  Strides strides = Strides::kContiguous;

  std::string text() const {
    return "T=" + std::to_string(num_tokens) + " d=" + std::to_string(hidden_size) +
           " E=" + std::to_string(num_experts) + " x " + std::string(name_of(x)) + " Wr " +
           std::string(name_of(weight)) + " " + name_of(strides);
  }
};

std::vector<ProductCase> product_cases() {
  const DType f32 = DType::kFloat32, bf16 = DType::kBFloat16;
  return {
      {1, 1, 1, f32, f32, false, false},
      {70, 33, 5, f32, f32, true, true},
      {300, 200, 66, f32, f32, true, false},
      {300, 200, 66, bf16, bf16, true, false},
      {129, 520, 130, bf16, bf16, false, true},
      {1, 8, 1, bf16, bf16, true, false},
      {260, 100, 12, bf16, bf16, true, true},  // d no multiple of 8
      {64, 64, 32, bf16, f32, true, false},
      {130, 72, 20, bf16, bf16, true, false, Strides::kPadded},
      {1500, 128, 256, bf16, bf16, false, false},
      {1500, 136, 40, bf16, f32, true, true},
      {1500, 264, 36, bf16, bf16, true, false},  // slices of tokens, E no multiple of 8
  };
}

// sum_k left(i, k) right(k, j), and the sums of |terms|.
struct Product {
  Values sums, magnitudes;
};
template <class Left, class Right>
Product multiply(std::int64_t rows, std::int64_t columns, std::int64_t depth, const Left& left,
                 const Right& right) {
  Product product;
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      double sum = 0.0, magnitude = 0.0;
      for (std::int64_t k = 0; k < depth; ++k) {
        const double term = left(i, k) * right(k, j);
        sum += term;
        magnitude += std::abs(term);
      }
      product.sums.push_back(sum);
      product.magnitudes.push_back(magnitude);
    }
  }
  return product;
}

constexpr double kFloatProducts = 0x1p-20, kTwoTermProducts = 0x1p-16;

// Float32 sums: |error| <= 2^-20 sum|terms|, or 2^-16 where the float32 operand may be taken in two
// bfloat16 terms, plus the rounding of a bfloat16 result. An operand rounded to bfloat16 or TF32 on
// the way would be off by 2^-12 and more.
void expect_product(const Values& actual, const Product& expected, DType dtype,
                    double product_error = kFloatProducts) {
  ASSERT_EQ(actual.size(), expected.sums.size());
  const double rounding = dtype == DType::kBFloat16 ? 0x1p-8 : 0.0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const double tolerance =
        product_error * expected.magnitudes[i] + rounding * std::abs(expected.sums[i]);
    ASSERT_LE(std::abs(actual[i] - expected.sums[i]), tolerance)
        << "element " << i << ": " << actual[i] << ", expected " << expected.sums[i];
  }
}

Tensor strided_input(const Target& target, DType dtype, std::vector<std::int64_t> shape,
                     Strides strides, std::uint64_t seed) {
  Tensor tensor(target, dtype, shape, strides);
  tensor.fill(make_logits(shape[0], shape.size() > 1 ? shape[1] : 1, 0.0, false, seed));
  return tensor;
}

MoEShape shape_of(const ProductCase& c) {
  MoEShape shape;
  shape.num_tokens = c.num_tokens;
  shape.hidden_size = c.hidden_size;
  shape.num_experts = c.num_experts;
  shape.numerics = Numerics::of(c.x);
  return shape;
}

std::size_t at(std::int64_t row, std::int64_t columns, std::int64_t column) {
  return rig::at(row * columns + column);
}

void check_logits(const Target& target, const ProductCase& c) {
  const std::int64_t num_tokens = c.num_tokens, d = c.hidden_size, num_experts = c.num_experts;
  const Context context = target.context(3);
  const ComposedBackend& backend = parts_of(context);
  const Tensor x = strided_input(target, c.x, {num_tokens, d}, c.strides, 41);
  const Tensor weight = strided_input(target, c.weight, {num_experts, d}, c.strides, 42);
  Tensor bias;
  if (c.bias) bias = strided_input(target, c.weight, {num_experts}, Strides::kContiguous, 43);
  const Tensor logits = output(target, DType::kFloat32, {num_tokens, num_experts});
  const GuardedBuffer workspace(target,
                                backend.router_logits_workspace_bytes(context, shape_of(c)));
  backend.router_logits(context, x.view(), weight.view(), bias.view(), logits.view(),
                        workspace.view());
  const Values xs = x.values(), ws = weight.values();
  const Values bs = c.bias ? bias.values() : Values();
  const Product expected = multiply(
      num_tokens, num_experts, d + 1,
      [&](std::int64_t t, std::int64_t k) { return k < d ? xs[at(t, d, k)] : 1.0; },
      [&](std::int64_t k, std::int64_t e) {
        return k < d ? ws[at(e, d, k)] : c.bias ? bs[static_cast<std::size_t>(e)] : 0.0;
      });
  expect_product(logits.values(), expected, DType::kFloat32);
  expect_output(logits);
  EXPECT_TRUE(workspace.guards_intact());
}

// dX, where the backend takes such an x.
void check_grad_x(const Target& target, const ProductCase& c, const Tensor& grad,
                  const GuardedBuffer& workspace) {
  const std::int64_t num_tokens = c.num_tokens, d = c.hidden_size, num_experts = c.num_experts;
  const bool cuda = target.device.type == DeviceType::kCuda;
  if (cuda && (c.x != DType::kBFloat16 || d % 8 != 0)) return;
  const Context context = target.context(3);
  const Tensor weight = strided_input(target, c.weight, {num_experts, d}, c.strides, 53);
  const Tensor grad_x(target, c.x, {num_tokens, d}, c.strides);
  parts_of(context).router_grad_x(context, grad.view(), weight.view(), grad_x.view(),
                                  workspace.view());
  const Values gs = grad.values(), ws = weight.values();
  const Product expected = multiply(
      num_tokens, d, num_experts,
      [&](std::int64_t t, std::int64_t e) { return gs[at(t, num_experts, e)]; },
      [&](std::int64_t e, std::int64_t column) { return ws[at(e, d, column)]; });
  // A GPU takes grad_logits rounded to bfloat16, as it does dH.
  expect_product(grad_x.values(), expected, c.x, cuda ? 0x1p-8 : kFloatProducts);
  expect_output(grad_x);
}

void check_gradients(const Target& target, const ProductCase& c) {
  const std::int64_t num_tokens = c.num_tokens, d = c.hidden_size, num_experts = c.num_experts;
  const Context context = target.context(3);
  const ComposedBackend& backend = parts_of(context);
  const Tensor x = strided_input(target, c.x, {num_tokens, d}, c.strides, 51);
  const Tensor grad =
      strided_input(target, DType::kFloat32, {num_tokens, num_experts}, Strides::kContiguous, 52);
  const DType dtype = c.accumulate ? DType::kFloat32 : c.weight;
  Tensor grad_weight(target, dtype, {num_experts, d}, c.strides);
  Tensor grad_bias(target, dtype, {num_experts});
  const double before = c.accumulate ? 0.25 : 0.0;
  if (c.accumulate) {
    grad_weight.fill_constant(before);
    grad_bias.fill_constant(before);
  }
  const GuardedBuffer workspace(
      target, backend.router_logits_backward_workspace_bytes(context, shape_of(c)));
  check_grad_x(target, c, grad, workspace);
  backend.router_logits_backward(context, x.view(), grad.view(), grad_weight.view(),
                                 grad_bias.view(), c.accumulate, workspace.view());
  const Values xs = x.values(), gs = grad.values();
  const auto left = [&](std::int64_t e, std::int64_t t) {
    return t < num_tokens ? gs[at(t, num_experts, e)] : before;
  };
  const auto right = [&](std::int64_t t, std::int64_t column) {
    return t < num_tokens ? xs[at(t, d, column)] : 1.0;
  };
  const auto ones = [](std::int64_t, std::int64_t) { return 1.0; };
  expect_product(grad_weight.values(), multiply(num_experts, d, num_tokens + 1, left, right), dtype,
                 c.x == DType::kBFloat16 ? kTwoTermProducts : kFloatProducts);
  expect_product(grad_bias.values(), multiply(num_experts, 1, num_tokens + 1, left, ones), dtype);
  expect_output(grad_weight);
  expect_output(grad_bias);
  EXPECT_TRUE(workspace.guards_intact());
}

TEST_P(RouterProducts, LogitsMatchFloat64) {
  for (const ProductCase& c : product_cases()) {
    SCOPED_TRACE(c.text());
    check_logits(target(), c);
  }
}

TEST_P(RouterProducts, LogitsGradientsMatchFloat64) {
  for (const ProductCase& c : product_cases()) {
    SCOPED_TRACE(c.text());
    check_gradients(target(), c);
  }
}

TEST_P(RouterProducts, GradientsOfNoTokensAreZero) {
  const Context context = target().context(3);
  const ComposedBackend& backend = parts_of(context);
  const Tensor x = output(target(), DType::kFloat32, {0, 40});
  const Tensor grad = output(target(), DType::kFloat32, {0, 70});
  const Tensor grad_weight = output(target(), DType::kFloat32, {70, 40});
  const Tensor grad_bias = output(target(), DType::kFloat32, {70});
  const GuardedBuffer workspace(
      target(), backend.router_logits_backward_workspace_bytes(
                    context, shape_of({0, 40, 70, DType::kFloat32, DType::kFloat32, true, false})));
  backend.router_logits_backward(context, x.view(), grad.view(), grad_weight.view(),
                                 grad_bias.view(), false, workspace.view());
  EXPECT_EQ(grad_weight.values(), Values(70 * 40, 0.0));
  EXPECT_EQ(grad_bias.values(), Values(70, 0.0));
}

}  // namespace
}  // namespace sonicmoe::rig
