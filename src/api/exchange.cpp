// Validation and dispatch of Exchange, moe_exchange_forward and moe_exchange_backward.
#include "sonicmoe/exchange.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <utility>

#include "api/arguments.hpp"
#include "api/checks.hpp"
#include "core/exchange.hpp"
#include "core/workspace.hpp"
#include "layer/exchange.hpp"

namespace sonicmoe {
namespace {

constexpr std::int64_t kMostTokens = (std::int64_t{1} << 30) - 1;  // ExchangeFlag::num_tokens

void check_exchange_shape(const Check& check, const ExchangeShape& s) {
  constexpr std::int64_t kMostColumns = (std::int64_t{1} << 31) - 1;
  check.between("num_ranks", s.num_ranks, 1, kMostRanks);
  check.between("max_tokens", s.max_tokens, 1, kMostTokens);
  check.between("hidden_size", s.hidden_size, 1, kMostColumns);
  check.between("num_experts", s.num_experts, 1, kMostColumns);
  check.that(s.num_experts % s.num_ranks == 0, "num_experts",
             "a multiple of num_ranks, " + std::to_string(s.num_ranks),
             std::to_string(s.num_experts));
  check.between("top_k", s.top_k, 1, kMostRows);
  check_numerics(check, s.numerics);
  check.between(
      "num_ranks * max_tokens * top_k",
      check.product("num_ranks * max_tokens * top_k", {s.num_ranks, s.max_tokens, s.top_k}), 1,
      kMostRows);
  check.product("num_ranks * max_tokens * hidden_size", {s.num_ranks, s.max_tokens, s.hidden_size});
}

double checked_timeout(const Check& check, const ExchangeOptions& options) {
  const char* argument = "timeout_seconds";
  double seconds = 600.0;
  std::string given;
  if (options.timeout_seconds) {
    seconds = *options.timeout_seconds;
    given = std::to_string(seconds);
  } else if (const char* text = std::getenv("SONICMOE_EP_TIMEOUT"); text != nullptr) {
    argument = "SONICMOE_EP_TIMEOUT";
    given = text;
    char* end = nullptr;
    seconds = std::strtod(text, &end);
    if (end == text || *end != '\0') seconds = 0.0;
  }
  check.that(std::isfinite(seconds) && seconds > 0.0, argument, "a positive number of seconds",
             given);
  return seconds;
}

void check_buffers(const Check& check, const ExchangeShape& shape, std::span<void* const> buffers) {
  check.that(buffers.size() == static_cast<std::size_t>(shape.num_ranks), "buffers",
             std::to_string(shape.num_ranks) + " of them, one for each rank",
             std::to_string(buffers.size()));
  for (std::size_t s = 0; s < buffers.size(); ++s) {
    const auto address = reinterpret_cast<std::uintptr_t>(buffers[s]);
    const std::string which = "that of rank " + std::to_string(s);
    check.that(address != 0, "buffers", "the buffer of every rank",
               "none for rank " + std::to_string(s));
    check.that(address % WorkspaceCarver::kPieceAlignment == 0, "buffers",
               "addresses aligned to 128", which + " at " + std::to_string(address));
    for (std::size_t other = 0; other < s; ++other) {
      const auto a = reinterpret_cast<std::uintptr_t>(buffers[other]);
      const std::size_t distance = address > a ? address - a : a - address;
      check.that(distance >= exchange_bytes(shape), "buffers", "a buffer for each rank",
                 which + " and that of rank " + std::to_string(other) + " share memory");
    }
  }
}

void check_exchange(const Check& check, const Exchange& exchange) {
  (void)exchange.port();
  check.that(exchange.device() == check.device(), "exchange", "one on " + to_string(check.device()),
             "one on " + to_string(exchange.device()));
}

// Of x or grad_out.
void check_tokens(const Check& check, const ExchangeShape& shape, const char* name,
                  const ConstTensorView& x) {
  check.rank(name, x, 2);
  check.shape(name, x, {x.size(0), shape.hidden_size});
  check.dtype(name, x, {shape.numerics.storage});
  check.unit_stride(name, x, 1);
  check.that(x.size(0) <= shape.max_tokens, name,
             "at most " + std::to_string(shape.max_tokens) + " tokens, max_tokens of the exchange",
             x.describe());
}

void check_rows(const Check& check, const Exchange& exchange, const char* name,
                const ConstTensorView& view) {
  check.refuse(exchange.port().reason_against(name, view));
}

void check_routing(const Check& check, const ExchangeShape& shape, std::int64_t num_tokens,
                   const ConstTensorView& ids, const ConstTensorView& weights) {
  check.shape("topk_ids", ids, {num_tokens, shape.top_k});
  check.dtype("topk_ids", ids, {DType::kInt32, DType::kInt64});
  check.contiguous("topk_ids", ids);
  check.shape("topk_weights", weights, {num_tokens, shape.top_k});
  check.dtype("topk_weights", weights, {DType::kFloat32, DType::kBFloat16});
  check.contiguous("topk_weights", weights);
}

void check_experts(const Check& check, const ExchangeShape& shape, const ExpertOptions& options,
                   const ExpertWeights& weights) {
  check.that(options.zero_absent_tokens, "zero_absent_tokens", "true", "false");
  check.rank("w2", weights.w2, 3);
  check.that(weights.w2.size(0) == shape.experts_per_rank(), "w2",
             std::to_string(shape.experts_per_rank()) + " experts, num_experts / num_ranks",
             weights.w2.describe());
}

void check_received(const Check& check, const ExchangeShape& shape,
                    const ConstTensorView& received) {
  if (!received.defined()) return;
  check.shape("received", received, {shape.num_places(), shape.hidden_size});
  check.dtype("received", received, {shape.numerics.storage});
  check.contiguous("received", received);
}

void check_output(const Check& check, const Exchange& exchange, const char* name,
                  const ConstTensorView& out, const ConstTensorView& like) {
  check.shape_like(name, out, like);
  check.dtype(name, out, {exchange.shape().numerics.storage});
  check.unit_stride(name, out, 1);
  check_rows(check, exchange, name, out);
}

void check_workspace_bytes(const Check& check, const ExchangeShape& shape, const ExpertPlan& plan,
                           const TensorView& workspace) {
  check.buffer("workspace", workspace, exchange_scratch_bytes(shape) + plan.workspace.bytes,
               WorkspaceCarver::kAlignment);
}

// The tensors of a call and the exchange's own buffer.
template <class Args>
void check_exchange_memory(const Check& check, const Exchange& exchange, const Args& args) {
  CallMemory memory(check);
  for_each_tensor(args, [&](const char* name, const ConstTensorView& view, Access access) {
    memory.add(name, view, access);
  });
  const TensorView own(exchange.port().parts().header, DType::kUInt8,
                       {static_cast<std::int64_t>(exchange_bytes(exchange.shape()))},
                       check.device());
  memory.add("exchange", own, Access::kWrite);
  memory.check_overlaps();
}

// A layer on views of any address: moe_shape() looks at their sizes alone.
MoEShape layer_shape(const ExchangeShape& shape, const ExpertOptions& options,
                     const ExpertWeights& weights) {
  alignas(WorkspaceCarver::kAlignment) static const std::byte anything[64]{};
  const Device device = weights.w2.device();
  const ConstTensorView x(anything, shape.numerics.storage, {shape.num_places(), shape.hidden_size},
                          device);
  const ConstTensorView ids(anything, DType::kInt32, {shape.num_places(), shape.top_k}, device);
  const ConstTensorView scores(anything, DType::kFloat32, {shape.num_places(), shape.top_k},
                               device);
  return moe_shape(options, x, weights, TopKRouting{ids, scores});
}

}  // namespace

std::size_t exchange_bytes(const ExchangeShape& shape) {
  check_exchange_shape(Check("exchange_bytes", Device{}), shape);
  WorkspaceCarver carver;
  carve_exchange(carver, shape);
  return carver.used();
}

Exchange::Exchange(const Context& context, const ExchangeShape& shape, int rank,
                   std::span<void* const> buffers, const ExchangeOptions& options)
    : shape_(shape), rank_(rank), device_(context.device) {
  answer("exchange", context, [&](const Check& check) {
    check_exchange_shape(check, shape);
    check.between("rank", rank, 0, shape.num_ranks - 1);
    check_buffers(check, shape, buffers);
    const double timeout = checked_timeout(check, options);
    port_ = choose_backend(context, check.operation())
                .make_exchange(check, context, shape, rank, buffers, timeout);
  });
}
Exchange::~Exchange() = default;
Exchange::Exchange(Exchange&&) noexcept = default;
Exchange& Exchange::operator=(Exchange&&) noexcept = default;

void Exchange::check() const { port().check("exchange"); }

ExchangePort& Exchange::port() const {
  if (port_ == nullptr) throw Error("exchange", "exchange", "an exchange", "one moved from");
  return *port_;
}

MoEShape moe_exchange_shape(const ExchangeShape& exchange, const ExpertOptions& options,
                            const ExpertWeights& weights) {
  const Check check("moe_exchange_shape", weights.w2.device());
  check_exchange_shape(check, exchange);
  check_experts(check, exchange, options, weights);
  try {
    return layer_shape(exchange, options, weights);
  } catch (const Error& error) {
    throw Error(check.operation(), error);
  }
}

std::size_t moe_exchange_forward_workspace(const Context& context, const ExchangeShape& exchange,
                                           const MoEShape& shape, bool inference) {
  return answer("moe_exchange_forward_workspace", context, [&](const Check& check) {
    check_exchange_shape(check, exchange);
    return exchange_scratch_bytes(exchange) +
           moe_forward_workspace(context, shape, inference).bytes;
  });
}

std::size_t moe_exchange_backward_workspace(const Context& context, const ExchangeShape& exchange,
                                            const MoEShape& shape) {
  return answer("moe_exchange_backward_workspace", context, [&](const Check& check) {
    check_exchange_shape(check, exchange);
    return exchange_scratch_bytes(exchange) + moe_backward_workspace(context, shape).bytes;
  });
}

void moe_exchange_forward(const Context& context, Exchange& exchange,
                          const MoEExchangeForwardArgs& args) {
  run_operation("moe_exchange_forward", context, [&](const Check& check) {
    const ExchangeShape& sizes = exchange.shape();
    check_exchange(check, exchange);
    check_tokens(check, sizes, "x", args.x);
    check_rows(check, exchange, "x", args.x);
    check_routing(check, sizes, args.x.size(0), args.topk_ids, args.topk_weights);
    check_experts(check, sizes, args.options, args.weights);
    check_received(check, sizes, args.received);
    check_output(check, exchange, "out", args.out, args.x);
    const MoEForwardArgs experts = expert_args(exchange, check.device(), args);
    const MoEShape shape = check_moe_forward(check, experts);
    const Backend& backend = choose_backend(context, check.operation());
    backend.check_moe_forward(check, shape, experts);
    const ExpertPlan plan = backend.plan_moe_forward(context, shape, !args.h.defined(), {});
    check_workspace_bytes(check, sizes, plan, args.workspace);
    check_exchange_memory(check, exchange, args);
    exchange.port().check(check.operation());
    exchange_forward(backend, context, exchange, plan, experts, args);
  });
}

void moe_exchange_backward(const Context& context, Exchange& exchange,
                           const MoEExchangeBackwardArgs& args) {
  run_operation("moe_exchange_backward", context, [&](const Check& check) {
    const ExchangeShape& sizes = exchange.shape();
    check_exchange(check, exchange);
    check_tokens(check, sizes, "grad_out", args.grad_out);
    check_rows(check, exchange, "grad_out", args.grad_out);
    check.that(args.x.defined() != args.received.defined(), "x", "either x or received",
               args.x.defined() ? "both" : "neither");
    if (args.x.defined()) {
      check_tokens(check, sizes, "x", args.x);
      check.shape_like("x", args.x, args.grad_out);
      check_rows(check, exchange, "x", args.x);
    }
    check_routing(check, sizes, args.grad_out.size(0), args.topk_ids, args.topk_weights);
    check_experts(check, sizes, args.options, args.weights);
    check_received(check, sizes, args.received);
    check_output(check, exchange, "grad_x", args.grad_x, args.grad_out);
    check.shape_like("grad_routing_weights", args.grad_routing_weights, args.topk_weights);
    check.dtype("grad_routing_weights", args.grad_routing_weights, {DType::kFloat32});
    check.contiguous("grad_routing_weights", args.grad_routing_weights);
    const MoEBackwardArgs experts = expert_args(exchange, check.device(), args);
    const MoEShape shape = check_moe_backward(check, experts);
    const Backend& backend = choose_backend(context, check.operation());
    backend.check_moe_backward(check, shape, experts);
    const ExpertPlan plan = backend.plan_moe_backward(context, shape, {}, BackwardStep::kAll);
    check_workspace_bytes(check, sizes, plan, args.workspace);
    check_exchange_memory(check, exchange, args);
    exchange.port().check(check.operation());
    exchange_backward(backend, context, exchange, plan, experts, args);
  });
}

}  // namespace sonicmoe
