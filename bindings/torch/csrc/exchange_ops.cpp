// ep_moe_forward and ep_moe_backward: experts spread over ranks, each call a whole exchange; and
// the exchanges that they name.
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>

#include "gradients.hpp"
#include "kept_memory.hpp"
#include "ops.hpp"
#include "options.hpp"

namespace sonicmoe_torch {
namespace {

// ---------------------------------------------------------------------------------------- registry

// An operator's argument is a number: what an exchange holds can be no tensor.
class Exchanges {
 public:
  static Exchanges& all() {
    static auto& exchanges = *new Exchanges;  // calls may still run on other threads at exit
    return exchanges;
  }
  std::int64_t add(sonicmoe::Exchange exchange) {
    const std::lock_guard lock(mutex_);
    open_.emplace(++last_, std::make_shared<sonicmoe::Exchange>(std::move(exchange)));
    return last_;
  }
  void close(std::int64_t handle) {
    const std::lock_guard lock(mutex_);
    open_.erase(handle);
  }
  std::shared_ptr<sonicmoe::Exchange> at(const char* operation, std::int64_t handle) {
    const std::lock_guard lock(mutex_);
    const auto found = open_.find(handle);
    if (found == open_.end()) {
      throw sonicmoe::Error(operation, "exchange", "one that is open", std::to_string(handle));
    }
    return found->second;
  }

 private:
  std::mutex mutex_;
  std::map<std::int64_t, std::shared_ptr<sonicmoe::Exchange>> open_;
  std::int64_t last_ = 0;
};

constexpr const char* kBytesSchema = "exchange_bytes(Tensor like, int[] sizes) -> int";
// A negative timeout: the library's default.
constexpr const char* kOpenSchema =
    "exchange_open(Tensor like, int[] sizes, int rank, int[] buffers, float timeout_seconds) -> "
    "int";
constexpr const char* kCloseSchema = "exchange_close(int exchange) -> ()";
constexpr const char* kCheckSchema = "exchange_check(int exchange) -> ()";

// sizes: num_ranks, max_tokens, hidden_size, num_experts, top_k. `like` has the dtype and lies on
// the device.
sonicmoe::ExchangeShape shape_of(const Views& views, const Tensor& like, const Integers& sizes) {
  const auto [num_ranks, max_tokens, hidden_size, num_experts, top_k] =
      exactly<5>(views, "sizes", sizes);
  return {.num_ranks = static_cast<int>(num_ranks),
          .max_tokens = max_tokens,
          .hidden_size = hidden_size,
          .num_experts = num_experts,
          .top_k = top_k,
          .numerics = sonicmoe::Numerics::of(views.in("like", like).dtype())};
}

std::int64_t exchange_bytes(const Tensor& like, const Integers& sizes) {
  const Views views("exchange_bytes");
  return static_cast<std::int64_t>(
      views.ask([&] { return sonicmoe::exchange_bytes(shape_of(views, like, sizes)); }));
}

std::int64_t exchange_open(const Tensor& like, const Integers& sizes, std::int64_t rank,
                           const Integers& buffers, double timeout_seconds) {
  const Views views("exchange_open");
  const Call call(like);
  std::vector<void*> addresses;
  for (const std::int64_t address : buffers) addresses.push_back(reinterpret_cast<void*>(address));
  sonicmoe::ExchangeOptions options;
  if (timeout_seconds >= 0) options.timeout_seconds = timeout_seconds;
  return Exchanges::all().add(sonicmoe::Exchange(call.context(), shape_of(views, like, sizes),
                                                 static_cast<int>(rank), addresses, options));
}

void exchange_close(std::int64_t exchange) { Exchanges::all().close(exchange); }

void exchange_check(std::int64_t exchange) {
  Exchanges::all().at("exchange_check", exchange)->check();
}

// --------------------------------------------------------------------------------------- operators

constexpr const char* kForwardSchema =
    "ep_moe_forward(Tensor x, int exchange, Tensor ids, Tensor weights, Tensor w1, Tensor? b1, "
    "Tensor w2, Tensor? b2, int[] options, float[] reals, bool save_for_backward, "
    "bool keep_received) -> (Tensor y, Tensor h, Tensor metadata, Tensor received, "
    "Tensor rows_dropped)";

// x and y [T, d]; h [C, g*n] and metadata bytes, empty without save_for_backward; received
// [size * max_tokens, d], empty without keep_received; rows_dropped [1] int32, empty without
// max_rows.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ep_moe_forward(
    const Tensor& x, std::int64_t exchange, const Tensor& ids, const Tensor& weights,
    const Tensor& w1, const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2,
    const Integers& options, const Reals& reals, bool save_for_backward, bool keep_received) {
  const Views views("ep_moe_forward");
  const Call call(x);
  const auto opened = Exchanges::all().at(views.operation(), exchange);
  const ExpertCall experts =
      unpack_routed_experts(PackedOptions(views.operation(), options, reals));
  sonicmoe::MoEExchangeForwardArgs args{
      .options = experts.options,
      .x = views.rows("x", x),
      .weights = {views.in("w1", w1), views.in("b1", b1), views.in("w2", w2), views.in("b2", b2)},
      .topk_ids = views.in("topk_ids", ids),
      .topk_weights = views.in("topk_weights", weights)};
  const sonicmoe::ExchangeShape& sizes = opened->shape();
  const auto shape =
      views.ask([&] { return sonicmoe::moe_exchange_shape(sizes, args.options, args.weights); });
  const std::size_t bytes = views.ask([&] {
    return sonicmoe::moe_exchange_forward_workspace(call.context(), sizes, shape,
                                                    !save_for_backward);
  });

  const Tensor y = new_like_contiguous(x, x.scalar_type());
  Tensor h = nothing(x), received = nothing(x);
  Tensor metadata = new_bytes(x, 0);
  if (save_for_backward) {
    h = new_kept(x, {shape.row_capacity(), shape.h_columns()}, x.scalar_type());
    metadata = new_bytes(x, sonicmoe::moe_metadata_bytes(shape));
    args.h = views.out("h", h);
    args.metadata = views.out("metadata", metadata);
  }
  if (keep_received) {
    received = new_kept(x, {sizes.num_places(), sizes.hidden_size}, x.scalar_type());
    args.received = views.out("received", received);
  }
  const Tensor rows_dropped = new_tensor(x, {shape.max_rows ? 1 : 0}, ScalarType::Int);
  if (shape.max_rows) args.rows_dropped = views.out("rows_dropped", rows_dropped);
  const Tensor workspace = new_workspace(x, bytes, false);
  args.out = views.out_rows("out", y);
  args.workspace = views.out("workspace", workspace);
  sonicmoe::moe_exchange_forward(call.context(), *opened, args);
  return {y, h, metadata, received, rows_dropped};
}

constexpr const char* kBackwardSchema =
    "ep_moe_backward(Tensor grad_out, Tensor x, int exchange, Tensor ids, Tensor weights, "
    "Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor[] saved, int[] options, float[] reals, "
    "bool[] needs) -> (Tensor grad_x, Tensor grad_weights, Tensor grad_w1, Tensor grad_b1, "
    "Tensor grad_w2, Tensor grad_b2)";

// saved: h, metadata and, where forward kept them, received. needs: w1, b1, w2, b2; what they do
// not name comes back empty. The other two travel whether needed or not: all ranks take part.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ep_moe_backward(
    const Tensor& grad_out, const Tensor& x, std::int64_t exchange, const Tensor& ids,
    const Tensor& weights, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
    const OptionalTensor& b2, const Tensors& saved, const Integers& options, const Reals& reals,
    const Needs& needs) {
  const Views views("ep_moe_backward");
  const Call call(x);
  const auto opened = Exchanges::all().at(views.operation(), exchange);
  const ExpertCall experts =
      unpack_routed_experts(PackedOptions(views.operation(), options, reals));
  const auto [h, metadata, received] = exactly<3>(views, "saved", saved);
  const bool kept = received.numel() > 0;
  sonicmoe::MoEExchangeBackwardArgs args{
      .options = experts.options,
      .grad_out = views.rows("grad_out", grad_out),
      .x = kept ? sonicmoe::ConstTensorView() : views.rows("x", x),
      .weights = {views.in("w1", w1), views.in("b1", b1), views.in("w2", w2), views.in("b2", b2)},
      .topk_ids = views.in("topk_ids", ids),
      .topk_weights = views.in("topk_weights", weights),
      .h = views.in("h", h),
      .metadata = views.in("metadata", metadata)};
  if (kept) args.received = views.in("received", received);
  const sonicmoe::ExchangeShape& sizes = opened->shape();
  const auto shape =
      views.ask([&] { return sonicmoe::moe_exchange_shape(sizes, args.options, args.weights); });
  const std::size_t bytes = views.ask(
      [&] { return sonicmoe::moe_exchange_backward_workspace(call.context(), sizes, shape); });

  const Tensor grad_x = new_like_contiguous(x, x.scalar_type());
  const Tensor grad_weights = new_like_contiguous(weights, ScalarType::Float);
  Gradients gradients(views, x, needs, 4, {}, 0);
  const Gradient grad_w1 = gradients.of_weight("grad_w1", w1);
  const Gradient grad_b1 = gradients.of_bias("grad_b1", b1);
  const Gradient grad_w2 = gradients.of_weight("grad_w2", w2);
  const Gradient grad_b2 = gradients.of_bias("grad_b2", b2);
  args.grad_x = views.out_rows("grad_x", grad_x);
  args.grad_routing_weights = views.out("grad_routing_weights", grad_weights);
  args.grad_w1 = grad_w1.view;
  args.grad_b1 = grad_b1.view;
  args.grad_w2 = grad_w2.view;
  args.grad_b2 = grad_b2.view;
  const Tensor workspace = new_workspace(x, bytes, false);
  args.workspace = views.out("workspace", workspace);
  sonicmoe::moe_exchange_backward(call.context(), *opened, args);
  return {grad_x, grad_weights, grad_w1.tensor, grad_b1.tensor, grad_w2.tensor, grad_b2.tensor};
}

}  // namespace

void define_exchange_ops(Library& library) {
  library.def(kBytesSchema);
  library.def(kOpenSchema);
  library.def(kCloseSchema);
  library.def(kCheckSchema);
  library.def(kForwardSchema);
  library.def(kBackwardSchema);
}

void implement_exchange_ops(Library& library) {
  library.impl("exchange_bytes", TORCH_BOX(&exchange_bytes));
  library.impl("exchange_open", TORCH_BOX(&exchange_open));
  library.impl("ep_moe_forward", TORCH_BOX(&ep_moe_forward));
  library.impl("ep_moe_backward", TORCH_BOX(&ep_moe_backward));
}

void implement_exchange_ops_of_any_device(Library& library) {
  library.impl("exchange_close", TORCH_BOX(&exchange_close));
  library.impl("exchange_check", TORCH_BOX(&exchange_check));
}

}  // namespace sonicmoe_torch
