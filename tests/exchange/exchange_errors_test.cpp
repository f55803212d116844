// Every error that exchange.hpp documents names its argument, before anything is published.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <functional>

#include "rig/exchange_group.hpp"
#include "sonicmoe/error.hpp"

namespace sonicmoe::rig {
namespace {

ExchangeShape valid_shape() {
  return {.num_ranks = 2,
          .max_tokens = 5,
          .hidden_size = 16,
          .num_experts = 4,
          .top_k = 3,
          .numerics = Numerics::of(DType::kBFloat16)};
}

std::string argument_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.argument().empty() ? error.what() : error.argument();
  }
  return "(no error)";
}

TEST(ExchangeBytes, AreThoseOfTheParts) {
  // Three times 10 rows of 16 bfloat16, 10 x 3 scores, 5 x 3 ids and weights, header of 776 bytes.
  EXPECT_EQ(exchange_bytes(valid_shape()), 896u + 3 * 384u + 128u + 64u + 64u + 64u + 64u);
}

TEST(ExchangeBytes, RefusesWhatCannotBe) {
  const std::vector<std::pair<std::string, std::function<void(ExchangeShape&)>>> spoils = {
      {"num_ranks", [](auto& s) { s.num_ranks = 0; }},
      {"num_ranks", [](auto& s) { s.num_ranks = 33; }},
      {"max_tokens", [](auto& s) { s.max_tokens = 0; }},
      {"max_tokens", [](auto& s) { s.max_tokens = std::int64_t{1} << 30; }},
      {"hidden_size", [](auto& s) { s.hidden_size = 0; }},
      {"num_experts", [](auto& s) { s.num_experts = 0; }},
      {"num_experts", [](auto& s) { s.num_experts = 5; }},
      {"top_k", [](auto& s) { s.top_k = 0; }},
      {"numerics", [](auto& s) { s.numerics = Numerics::of(DType::kFloat16); }},
      {"num_ranks * max_tokens * top_k", [](auto& s) { s.max_tokens = (1 << 30) - 1; }},
      {"num_ranks * max_tokens * hidden_size",
       [](auto& s) {
         s.max_tokens = 1 << 28;
         s.hidden_size = (std::int64_t{1} << 31) - 1;
         s.top_k = 1;
       }},
  };
  for (const auto& [argument, spoil] : spoils) {
    ExchangeShape shape = valid_shape();
    spoil(shape);
    EXPECT_EQ(argument_of([&] { (void)exchange_bytes(shape); }), argument);
  }
}

class ExchangeErrors : public ::testing::TestWithParam<Target> {};
INSTANTIATE_TEST_SUITE_P(Backends, ExchangeErrors, ::testing::ValuesIn(targets()),
                         [](const auto& test) { return test.param.backend; });

ExchangeCase case_of(const Target& target) {
  ExchangeCase c;
  c.layer.num_tokens = 10;
  c.layer.num_experts = 4;
  c.layer.top_k = 3;
  c.layer.hidden_size = c.layer.intermediate_size = 16;
  c.layer = fitted(target, c.layer);
  c.tokens = {5, 5};
  return c;
}

TEST_P(ExchangeErrors, OfTheConstructor) {
  const ExchangeShape shape = valid_shape();
  const std::size_t bytes = (exchange_bytes(shape) + 127) / 128 * 128;
  const GuardedBuffer memory(GetParam(), 2 * bytes + 128);
  const auto first = reinterpret_cast<std::byte*>(
      (reinterpret_cast<std::uintptr_t>(memory.data()) + 127) / 128 * 128);
  const std::vector<void*> buffers = {first, first + bytes};
  const auto make = [&](const ExchangeShape& s, int rank, std::vector<void*> addresses,
                        ExchangeOptions options = {}) {
    return argument_of([&] { Exchange(GetParam().context(), s, rank, addresses, options); });
  };
  EXPECT_EQ(make(shape, 0, buffers), "(no error)");
  EXPECT_EQ(make(shape, 2, buffers), "rank");
  EXPECT_EQ(make(shape, -1, buffers), "rank");
  EXPECT_EQ(make(shape, 0, {first}), "buffers");
  EXPECT_EQ(make(shape, 0, {first, nullptr}), "buffers");
  EXPECT_EQ(make(shape, 0, {first, first + 8}), "buffers");
  EXPECT_EQ(make(shape, 0, {first, first}), "buffers");
  EXPECT_EQ(make(shape, 0, buffers, {0.0}), "timeout_seconds");
  EXPECT_EQ(make(shape, 0, buffers, {std::nan("")}), "timeout_seconds");
  ExchangeShape odd = shape;
  odd.num_experts = 3;
  EXPECT_EQ(make(odd, 0, buffers), "num_experts");
  setenv("SONICMOE_EP_TIMEOUT", "10 min", 1);
  EXPECT_EQ(make(shape, 0, buffers), "SONICMOE_EP_TIMEOUT");
  setenv("SONICMOE_EP_TIMEOUT", "2.5", 1);
  EXPECT_EQ(make(shape, 0, buffers), "(no error)");
  unsetenv("SONICMOE_EP_TIMEOUT");
}

// Nothing is published by a call that is refused: the exchange then serves.
TEST_P(ExchangeErrors, OfForward) {
  ExchangeGroup group(GetParam(), case_of(GetParam()));
  const Tensor other_rank(GetParam(), group.inputs().x.dtype(), {4, 16});
  const Tensor six(GetParam(), group.inputs().x.dtype(), {6, 16});
  using Spoil = std::function<void(MoEExchangeForwardArgs&)>;
  const std::vector<std::pair<std::string, Spoil>> spoils = {
      {"x", [](auto& a) { a.x = ConstTensorView(); }},
      {"x", [&](auto& a) { a.x = six.view(); }},
      {"x", [](auto& a) { a.x = transposed(a.x, 0, 1); }},
      {"topk_ids", [&](auto& a) { a.x = other_rank.view(); }},
      {"topk_ids", [](auto& a) { a.topk_ids = a.topk_weights; }},
      {"topk_weights", [](auto& a) { a.topk_weights = a.topk_ids; }},
      {"w2", [](auto& a) { a.weights.w2 = a.weights.w1; }},
      {"w1", [](auto& a) { a.weights.w1 = a.weights.w2; }},
      {"out", [](auto& a) { a.out = TensorView(); }},
      {"h", [](auto& a) { a.h = TensorView(); }},
      {"metadata", [](auto& a) { a.metadata = TensorView(); }},
      {"received", [](auto& a) { a.received = a.out; }},
      {"rows_dropped", [](auto& a) { a.rows_dropped = a.out; }},
      {"workspace", [](auto& a) { a.workspace = TensorView(); }},
      {"workspace", [](auto& a) { a.workspace = a.metadata; }},
      {"max_rows", [](auto& a) { a.options.max_rows = -1; }},
      {"zero_absent_tokens", [](auto& a) { a.options.zero_absent_tokens = false; }},
      {"out",
       [](auto& a) {
         a.out = TensorView(const_cast<void*>(a.x.data()), a.x.dtype(), a.x.shape(), a.x.device());
       }},
  };
  for (const auto& [argument, spoil] : spoils) {
    MoEExchangeForwardArgs args = group.forward_args(0);
    spoil(args);
    EXPECT_EQ(
        argument_of([&] { moe_exchange_forward(group.context(0), *group.rank(0).exchange, args); }),
        argument);
  }
  group.forward();
  group.backward();
}

TEST_P(ExchangeErrors, OfBackward) {
  ExchangeGroup group(GetParam(), case_of(GetParam()));
  group.forward();
  using Spoil = std::function<void(MoEExchangeBackwardArgs&)>;
  const std::vector<std::pair<std::string, Spoil>> spoils = {
      {"grad_out", [](auto& a) { a.grad_out = ConstTensorView(); }},
      {"x", [](auto& a) { a.x = ConstTensorView(); }},
      {"x", [](auto& a) { a.received = a.x; }},
      {"topk_ids", [](auto& a) { a.topk_ids = ConstTensorView(); }},
      {"w2", [](auto& a) { a.weights.w2 = a.weights.w1; }},
      {"h", [](auto& a) { a.h = ConstTensorView(); }},
      {"metadata", [](auto& a) { a.metadata = ConstTensorView(); }},
      {"grad_x", [](auto& a) { a.grad_x = TensorView(); }},
      {"grad_routing_weights", [](auto& a) { a.grad_routing_weights = TensorView(); }},
      {"grad_w1", [](auto& a) { a.grad_w1 = a.grad_w2; }},
      {"workspace", [](auto& a) { a.workspace = TensorView(); }},
  };
  for (const auto& [argument, spoil] : spoils) {
    MoEExchangeBackwardArgs args = group.backward_args(0);
    spoil(args);
    EXPECT_EQ(argument_of(
                  [&] { moe_exchange_backward(group.context(0), *group.rank(0).exchange, args); }),
              argument);
  }
  group.backward();
}

TEST_P(ExchangeErrors, OfAnExchangeThatWasMovedFrom) {
  ExchangeGroup group(GetParam(), case_of(GetParam()));
  Exchange& exchange = *group.rank(0).exchange;
  Exchange other = std::move(exchange);
  EXPECT_EQ(argument_of([&] { exchange.check(); }), "exchange");  // NOLINT: that is the test
  EXPECT_EQ(
      argument_of([&] { moe_exchange_forward(group.context(0), exchange, group.forward_args(0)); }),
      "exchange");
  exchange = std::move(other);
  group.forward();
}

}  // namespace
}  // namespace sonicmoe::rig
