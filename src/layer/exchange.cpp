#include "layer/exchange.hpp"

namespace sonicmoe {
namespace {

using enum ExchangeStage;

ExchangeScratch carve(WorkspaceCarver& carver, const ExchangeShape& shape) {
  const std::size_t slots =
      static_cast<std::size_t>(shape.num_places()) * static_cast<std::size_t>(shape.top_k);
  ExchangeScratch scratch{};
  scratch.ids = carver.take<std::int32_t>(slots);
  scratch.weights = carver.take<float>(slots);
  return scratch;
}

// [EP * T_max, columns] of this rank's buffer or scratch.
TensorView places(const ExchangeShape& shape, void* data, DType dtype, std::int64_t columns,
                  const Device& device) {
  return {data, dtype, {shape.num_places(), columns}, device};
}

// max_rows may take all rows of a token that has an expert here: its partial row is read, and 0.
ExpertOptions options_here(ExpertOptions options) {
  options.zero_absent_tokens = options.max_rows.has_value();
  return options;
}

Routing routing_here(const Exchange& exchange, const ExchangeScratch& scratch,
                     const Device& device) {
  const ExchangeShape& shape = exchange.shape();
  // Nothing is there before the workspace is checked; anything not null will do.
  const ExchangeParts& parts = exchange.port().parts();
  void* ids = scratch.ids != nullptr ? scratch.ids : static_cast<void*>(parts.scores);
  void* weights = scratch.weights != nullptr ? scratch.weights : parts.scores;
  return TopKRouting{places(shape, ids, DType::kInt32, shape.top_k, device),
                     places(shape, weights, DType::kFloat32, shape.top_k, device),
                     exchange.rank() * shape.experts_per_rank()};
}

}  // namespace

std::size_t exchange_scratch_bytes(const ExchangeShape& shape) {
  WorkspaceCarver carver;
  carve(carver, shape);
  return carver.used();
}

ExchangeScratch exchange_scratch(const ExchangeShape& shape, const TensorView& workspace) {
  const std::size_t beside = exchange_scratch_bytes(shape);
  if (!workspace.defined() || workspace.nbytes() < beside) return {};
  WorkspaceCarver carver(workspace.data());
  ExchangeScratch scratch = carve(carver, shape);
  scratch.experts =
      TensorView(workspace.as<std::byte>() + beside, DType::kUInt8,
                 {static_cast<std::int64_t>(workspace.nbytes() - beside)}, workspace.device());
  return scratch;
}

MoEForwardArgs expert_args(const Exchange& exchange, const Device& device,
                           const MoEExchangeForwardArgs& args) {
  const ExchangeShape& shape = exchange.shape();
  const ExchangeParts& parts = exchange.port().parts();
  const ExchangeScratch scratch = exchange_scratch(shape, args.workspace);
  const DType dtype = shape.numerics.storage;
  MoEForwardArgs experts;
  experts.options = options_here(args.options);
  experts.x = args.received.defined()
                  ? args.received
                  : places(shape, parts.rows_x, dtype, shape.hidden_size, device);
  experts.weights = args.weights;
  experts.routing = routing_here(exchange, scratch, device);
  experts.out = places(shape, parts.partial, dtype, shape.hidden_size, device);
  experts.h = args.h;
  experts.metadata = args.metadata;
  experts.rows_dropped = args.rows_dropped;
  experts.workspace = scratch.experts;
  return experts;
}

MoEBackwardArgs expert_args(const Exchange& exchange, const Device& device,
                            const MoEExchangeBackwardArgs& args) {
  const ExchangeShape& shape = exchange.shape();
  const ExchangeParts& parts = exchange.port().parts();
  const ExchangeScratch scratch = exchange_scratch(shape, args.workspace);
  const DType dtype = shape.numerics.storage;
  MoEBackwardArgs experts;
  experts.options = options_here(args.options);
  experts.grad_out = places(shape, parts.rows_g, dtype, shape.hidden_size, device);
  experts.x = args.received.defined()
                  ? args.received
                  : places(shape, parts.rows_x, dtype, shape.hidden_size, device);
  experts.weights = args.weights;
  experts.routing = routing_here(exchange, scratch, device);
  experts.h = args.h;
  experts.metadata = args.metadata;
  experts.grad_x = places(shape, parts.partial, dtype, shape.hidden_size, device);
  experts.grad_w1 = args.grad_w1;
  experts.grad_b1 = args.grad_b1;
  experts.grad_w2 = args.grad_w2;
  experts.grad_b2 = args.grad_b2;
  experts.grad_routing_weights = places(shape, parts.scores, DType::kFloat32, shape.top_k, device);
  experts.accumulate = args.accumulate;
  experts.workspace = scratch.experts;
  return experts;
}

void exchange_forward(const Backend& backend, const Context& context, Exchange& exchange,
                      const ExpertPlan& plan, const MoEForwardArgs& experts,
                      const MoEExchangeForwardArgs& args) {
  ExchangePort& port = exchange.port();
  const ExchangeScratch scratch = exchange_scratch(exchange.shape(), args.workspace);
  const Publication publication{.operation = ExchangeOperation::kForward,
                                .digest = call_digest(exchange.shape(), plan.shape, args.options),
                                .num_tokens = args.x.size(0),
                                .x = args.x,
                                .grad_out = {},
                                .topk_ids = args.topk_ids,
                                .topk_weights = args.topk_weights};
  port.publish(context, publication);
  port.meet(context, publication, kPublished);
  port.collect(context, {.ids = scratch.ids,
                         .weights = scratch.weights,
                         .x = const_cast<void*>(experts.x.data()),
                         .grad_out = nullptr});
  backend.moe_forward(context, plan, experts);
  port.meet(context, publication, kReady);
  port.sum(context, args.out, nullptr);
}

void exchange_backward(const Backend& backend, const Context& context, Exchange& exchange,
                       const ExpertPlan& plan, const MoEBackwardArgs& experts,
                       const MoEExchangeBackwardArgs& args) {
  ExchangePort& port = exchange.port();
  const ExchangeScratch scratch = exchange_scratch(exchange.shape(), args.workspace);
  const bool kept = args.received.defined();
  const Publication publication{
      .operation = kept ? ExchangeOperation::kBackwardKept : ExchangeOperation::kBackward,
      .digest = call_digest(exchange.shape(), plan.shape, args.options),
      .num_tokens = args.grad_out.size(0),
      .x = args.x,
      .grad_out = args.grad_out,
      .topk_ids = args.topk_ids,
      .topk_weights = args.topk_weights};
  port.publish(context, publication);
  port.meet(context, publication, kPublished);
  port.collect(context, {.ids = scratch.ids,
                         .weights = scratch.weights,
                         .x = kept ? nullptr : const_cast<void*>(experts.x.data()),
                         .grad_out = const_cast<void*>(experts.grad_out.data())});
  backend.moe_backward(context, plan, experts);
  port.meet(context, publication, kReady);
  port.sum(context, args.grad_x, args.grad_routing_weights.as<float>());
}

}  // namespace sonicmoe
