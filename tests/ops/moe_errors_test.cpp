// Every error that moe.hpp documents names its argument.
#include <gtest/gtest.h>

#include <functional>

#include "rig/moe_case.hpp"
#include "sonicmoe/sonicmoe.hpp"

namespace sonicmoe::rig {
namespace {

std::string argument_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.argument().empty() ? error.what() : error.argument();
  }
  return "(no error)";
}

// A valid forward and backward call to spoil.
struct Call {
  explicit Call(const Target& t, const MoECase& c = {})
      : target(t),
        inputs(t, c),
        shape(inputs.shape()),
        out(t, c.dtype, {c.tokens(), c.hidden_size}),
        grad_x(t, c.dtype, {c.tokens(), c.hidden_size}),
        grad_w1(t, c.dtype, {c.num_experts, c.h_columns(), c.hidden_size}),
        h(t, c.dtype, {c.pairs(), c.h_columns()}),
        metadata(t, moe_metadata_bytes(shape)),
        forward_workspace(t, moe_forward_workspace(t.context(), shape).bytes),
        backward_workspace(t, moe_backward_workspace(t.context(), shape).bytes) {
    forward.options = backward.options = c.options();
    forward.x = backward.x = inputs.x.view();
    forward.weights = backward.weights = inputs.weights();
    forward.routing = backward.routing = inputs.routing();
    forward.out = out.view();
    forward.h = h.view();
    forward.metadata = metadata.view();
    forward.workspace = forward_workspace.view();
    backward.h = h.view();
    backward.metadata = metadata.view();
    backward.grad_out = inputs.grad_out.view();
    backward.grad_x = grad_x.view();
    backward.grad_w1 = grad_w1.view();
    backward.workspace = backward_workspace.view();
  }

  std::string forward_error() const {
    return argument_of([&] { moe_forward(target.context(), forward); });
  }
  std::string backward_error() const {
    return argument_of([&] { moe_backward(target.context(), backward); });
  }

  const Target& target;
  MoEInputs inputs;
  MoEShape shape;
  Tensor out, grad_x, grad_w1, h;
  GuardedBuffer metadata, forward_workspace, backward_workspace;
  MoEForwardArgs forward;
  MoEBackwardArgs backward;
};

// The same memory seen with other sizes (never more elements) or another dtype.
TensorView reshaped(const TensorView& view, std::initializer_list<std::int64_t> shape) {
  return TensorView(view.data(), view.dtype(), shape, view.device());
}
TensorView reshaped(const ConstTensorView& view, std::initializer_list<std::int64_t> shape) {
  return TensorView(const_cast<void*>(view.data()), view.dtype(), shape, view.device());
}
TensorView retyped(const ConstTensorView& view, DType dtype) {
  return TensorView(const_cast<void*>(view.data()), dtype, view.shape(), view.device());
}

class MoeErrors : public ::testing::TestWithParam<Target> {};
INSTANTIATE_TEST_SUITE_P(Backends, MoeErrors, ::testing::ValuesIn(targets()),
                         [](const auto& test) { return test.param.backend; });

TEST_P(MoeErrors, TheUnspoiledCallIsValid) {
  const Call call(GetParam(), fitted(GetParam(), {}));
  EXPECT_EQ(call.forward_error(), "(no error)");
  EXPECT_EQ(call.backward_error(), "(no error)");
}

// On a GPU the case itself would be declined; arguments_test.cpp attacks one that fits.
#define SKIP_ON_A_GPU() \
  if (GetParam().backend == "cuda") GTEST_SKIP() << "float32 and odd widths are for the CPU"

TEST_P(MoeErrors, ForwardShapesAndDtypes) {
  SKIP_ON_A_GPU();
  const MoECase c;
  using Spoil = std::function<void(MoEForwardArgs&)>;
  const std::vector<std::pair<std::string, Spoil>> spoils = {
      {"x", [](auto& a) { a.x = ConstTensorView(); }},
      {"x", [](auto& a) { a.x = reshaped(a.x, {a.x.size(0) * a.x.size(1)}); }},
      {"x", [](auto& a) { a.x = retyped(a.x, DType::kInt32); }},
      {"x", [](auto& a) { a.x = transposed(reshaped(a.x, {24, 13}), 0, 1); }},
      {"w1", [](auto& a) { a.weights.w1 = reshaped(a.weights.w1, {5, 39, 24}); }},
      {"w1", [](auto& a) { a.weights.w1 = retyped(a.weights.w1, DType::kBFloat16); }},
      {"w2", [](auto& a) { a.weights.w2 = ConstTensorView(); }},
      {"w2", [](auto& a) { a.weights.w2 = reshaped(a.weights.w2, {5, 23, 20}); }},
      {"b1", [](auto& a) { a.weights.b1 = reshaped(a.weights.b1, {5, 20}); }},
      {"b2", [](auto& a) { a.weights.b2 = reshaped(a.weights.b2, {5, 20}); }},
      {"out", [](auto& a) { a.out = reshaped(a.out, {12, 24}); }},
      {"out", [](auto& a) { a.out = retyped(a.out, DType::kBFloat16); }},
      {"h", [](auto& a) { a.h = TensorView(); }},
      {"metadata", [](auto& a) { a.metadata = TensorView(); }},
      {"h", [](auto& a) { a.h = reshaped(a.h, {25, 40}); }},
      {"metadata", [](auto& a) { a.metadata = reshaped(a.metadata, {16}); }},
      {"workspace", [](auto& a) { a.workspace = TensorView(); }},
      {"limit",
       [](auto& a) {
         a.options.activation = Activation::kSwiGLUClamped;
         a.options.limit = 0.0f;
       }},
  };
  for (const auto& [argument, spoil] : spoils) {
    Call call(GetParam(), c);
    spoil(call.forward);
    EXPECT_EQ(call.forward_error(), argument);
  }
}

TEST_P(MoeErrors, Buffers) {
  SKIP_ON_A_GPU();
  Call call(GetParam());
  const TensorView whole = call.forward.workspace;
  call.forward.workspace = reshaped(whole, {whole.size(0) - 1});
  EXPECT_EQ(call.forward_error(), "workspace");
  call.forward.workspace = whole;
  const TensorView metadata = call.forward.metadata;
  call.forward.metadata = reshaped(metadata, {metadata.size(0) - 1});
  EXPECT_EQ(call.forward_error(), "metadata");
}

TEST_P(MoeErrors, WeightsThatDisagreeAreBothShown) {
  Call call(GetParam());
  call.forward.weights.w2 = reshaped(call.forward.weights.w2, {5, 24, 19});
  try {
    moe_forward(GetParam().context(), call.forward);
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("[5, 38, 24]"), std::string::npos) << message;
    EXPECT_NE(message.find("w2 " + call.forward.weights.w2.describe()), std::string::npos)
        << message;
    EXPECT_NE(message.find(call.forward.weights.w1.describe()), std::string::npos) << message;
  }
}

TEST_P(MoeErrors, Routing) {
  Call topk(GetParam());
  auto& a = std::get<TopKRouting>(topk.forward.routing);
  const TopKRouting valid = a;
  a.topk_ids = retyped(valid.topk_ids, DType::kFloat32);
  EXPECT_EQ(topk.forward_error(), "topk_ids");
  a.topk_ids = reshaped(valid.topk_ids, {12, 2});
  EXPECT_EQ(topk.forward_error(), "topk_ids");
  a = valid;
  a.topk_weights = reshaped(valid.topk_weights, {13, 1});
  EXPECT_EQ(topk.forward_error(), "topk_weights");

  MoECase c;
  c.form = MoEShape::Form::kPairs;
  Call pairs(GetParam(), c);
  auto& p = std::get<PairRouting>(pairs.forward.routing);
  p.expert_ids = reshaped(p.expert_ids, {28});
  EXPECT_EQ(pairs.forward_error(), "expert_ids");

  c.form = MoEShape::Form::kSorted;
  Call sorted(GetParam(), c);
  auto& s = std::get<SortedRouting>(sorted.forward.routing);
  const ConstTensorView offsets = s.offsets;
  s.offsets = reshaped(offsets, {4});
  EXPECT_EQ(sorted.forward_error(), "offsets");
  s.offsets = offsets;
  if (GetParam().device.type != DeviceType::kCpu) return;  // values on a device are not read back
  sorted.inputs.offsets.fill_ids({3, 2, 5, 9, 29});
  EXPECT_EQ(sorted.forward_error(), "offsets");
  sorted.inputs.offsets.fill_ids({3, 4, 5, 9, 30});
  EXPECT_EQ(sorted.forward_error(), "offsets");
}

TEST_P(MoeErrors, Backward) {
  SKIP_ON_A_GPU();
  using Spoil = std::function<void(MoEBackwardArgs&)>;
  const std::vector<std::pair<std::string, Spoil>> spoils = {
      {"grad_out", [](auto& a) { a.grad_out = reshaped(a.grad_out, {12, 24}); }},
      {"h", [](auto& a) { a.h = ConstTensorView(); }},
      {"metadata", [](auto& a) { a.metadata = ConstTensorView(); }},
      {"grad_x", [](auto& a) { a.grad_x = reshaped(a.grad_x, {12, 24}); }},
      {"grad_w1", [](auto& a) { a.grad_w1 = reshaped(a.grad_w1, {5, 40, 23}); }},
      {"grad_w1", [](auto& a) { a.grad_w1 = retyped(a.grad_w1, DType::kBFloat16); }},
      {"grad_b1",
       [](auto& a) {
         a.weights.b1 = ConstTensorView();
         a.grad_b1 = reshaped(a.grad_w1, {5, 40});
       }},
      {"workspace", [](auto& a) { a.workspace = TensorView(); }},
      {"workspace_limit", [](auto& a) { a.workspace_limit = 1; }},
  };
  for (const auto& [argument, spoil] : spoils) {
    Call call(GetParam());
    spoil(call.backward);
    EXPECT_EQ(call.backward_error(), argument);
  }
}

TEST_P(MoeErrors, AccumulateNeedsFloat32) {
  MoECase c;
  c.dtype = DType::kBFloat16;
  Call call(GetParam(), fitted(GetParam(), c));
  EXPECT_EQ(call.forward_error(), "(no error)");  // writes the metadata
  EXPECT_EQ(call.backward_error(), "(no error)");
  call.backward.accumulate = true;
  EXPECT_EQ(call.backward_error(), "grad_w1");
}

// What the Hopper kernels decline is refused by the argument's name, before the first launch: the
// outputs keep their poison.
TEST_P(MoeErrors, WhatAGpuDeclines) {
  if (GetParam().backend != "cuda") GTEST_SKIP() << "the CPU takes all of these";
  const MoECase good = fitted(GetParam(), {});
  const auto with = [&](auto change) {
    MoECase c = good;
    change(c);
    return c;
  };
  const std::vector<std::pair<std::string, MoECase>> cases = {
      {"x", with([](MoECase& c) { c.dtype = DType::kFloat32; })},
      {"x", with([](MoECase& c) { c.hidden_size = 28; })},
      {"w1", with([](MoECase& c) { c.intermediate_size = 12; })},
      {"x", with([](MoECase& c) { c.x_strides = Strides::kPadded; })},
      {"w1", with([](MoECase& c) { c.w1_strides = Strides::kPadded; })},
      {"w2", with([](MoECase& c) { c.w2_strides = Strides::kTransposedPadded; })},
  };
  for (const auto& [argument, c] : cases) {
    Call call(GetParam(), c);
    EXPECT_EQ(call.forward_error(), argument) << c.describe();
    EXPECT_EQ(call.out.violation_as_input(), "");
    EXPECT_NE(call.backward_error(), "(no error)") << c.describe();
    EXPECT_EQ(call.grad_x.violation_as_input(), "");
  }
  // A gradient that is declined last leaves those before it untouched.
  Call call(GetParam(), good);
  EXPECT_EQ(call.forward_error(), "(no error)");
  const Tensor padded(GetParam(), good.dtype,
                      {good.num_experts, good.h_columns(), good.hidden_size}, Strides::kPadded);
  call.backward.grad_w1 = padded.view();
  EXPECT_EQ(call.backward_error(), "grad_w1");
  EXPECT_EQ(call.grad_x.violation_as_input(), "");
}

TEST(MoeDispatch, UnknownBackendIsAnError) {
  Context context;
  context.backend = "abacus";
  MoEShape shape;
  shape.hidden_size = shape.intermediate_size = shape.num_experts = 1;
  EXPECT_EQ(argument_of([&] { moe_forward_workspace(context, shape); }), "backend");
}

}  // namespace
}  // namespace sonicmoe::rig
