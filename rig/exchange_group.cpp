#include "rig/exchange_group.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <thread>

#include "cuda/hopper/choice.hpp"

#if defined(SONICMOE_HAS_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace sonicmoe::rig {
namespace {

constexpr std::size_t kAlignment = 128;

// Rows [first, first + count) of row-major values with `columns` columns.
Values rows_of(const Values& values, std::int64_t first, std::int64_t count, std::int64_t columns) {
  const auto begin = values.begin() + first * columns;
  return {begin, begin + count * columns};
}

Ids rows_of_ids(const Values& values, std::int64_t first, std::int64_t count,
                std::int64_t columns) {
  const Values rows = rows_of(values, first, count, columns);
  Ids ids;
  for (const double id : rows) ids.push_back(static_cast<std::int64_t>(id));
  return ids;
}

Tensor like(const Target& target, const Tensor& tensor) {
  if (!tensor.defined()) return {};
  const auto shape = tensor.view().shape();
  return Tensor(target, tensor.dtype(), {shape.begin(), shape.end()});
}

// The experts [first, first + count) of a parameter of the whole layer.
Tensor experts_of(const Target& target, const Tensor& all, std::int64_t first, std::int64_t count) {
  if (!all.defined()) return {};
  std::vector<std::int64_t> shape(all.view().shape().begin(), all.view().shape().end());
  const std::int64_t columns = all.numel() / shape[0];
  shape[0] = count;
  Tensor tensor(target, all.dtype(), shape);
  tensor.fill(rows_of(all.values(), first, count, columns));
  return tensor;
}

void append(Values& to, const Tensor& tensor) {
  if (!tensor.defined()) return;
  const Values values = tensor.values();
  to.insert(to.end(), values.begin(), values.end());
}

void* make_stream(const Target& target) {
#if defined(SONICMOE_HAS_CUDA)
  if (target.device.type == DeviceType::kCuda) {
    cudaStream_t stream = nullptr;
    if (cudaSetDevice(target.device.index) != cudaSuccess ||
        cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) != cudaSuccess) {
      throw std::runtime_error("cudaStreamCreate failed");
    }
    return stream;
  }
#endif
  (void)target;
  return nullptr;
}

void destroy_stream(void* stream) {
#if defined(SONICMOE_HAS_CUDA)
  if (stream != nullptr) (void)cudaStreamDestroy(static_cast<cudaStream_t>(stream));
#endif
  (void)stream;
}

// CTAs that products may have beside the waits of all ranks; 0, as many as they want, on a CPU.
int grid_beside(const Target& target, int num_ranks) {
  int count = 0;
#if defined(SONICMOE_HAS_CUDA)
  if (target.device.type == DeviceType::kCuda) {
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, target.device.index) !=
        cudaSuccess) {
      throw std::runtime_error("cudaDeviceGetAttribute failed");
    }
    count -= num_ranks;
  }
#endif
  (void)target, (void)num_ranks;
  return count;
}

void* aligned(const GuardedBuffer& buffer) {
  auto* begin = static_cast<std::byte*>(buffer.data());
  const std::size_t past = reinterpret_cast<std::uintptr_t>(begin) % kAlignment;
  return begin + (kAlignment - past) % kAlignment;
}

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return {};
}

float rounded(float value, DType dtype) {
  return dtype == DType::kBFloat16 ? static_cast<float>(bfloat16(value)) : value;
}

}  // namespace

std::string ExchangeCase::describe() const {
  std::ostringstream out;
  out << layer.describe() << " tokens of ranks:";
  for (const std::int64_t count : tokens) out << ' ' << count;
  if (max_tokens != 0) out << " of " << max_tokens;
  if (max_rows) out << " max_rows=" << *max_rows;
  out << (keep_received ? " kept" : "");
  return out.str();
}

std::vector<std::int64_t> spread_tokens(std::int64_t num_tokens, int num_ranks) {
  std::vector<std::int64_t> tokens;
  for (int r = 0; r < num_ranks; ++r) {
    tokens.push_back(num_tokens * (r + 1) / num_ranks - num_tokens * r / num_ranks);
  }
  return tokens;
}

ExchangeGroup::ExchangeGroup(const Target& target, const ExchangeCase& test_case)
    : target_(target),
      case_(test_case),
      inputs_(host_target(), test_case.layer),
      grid_before_(cuda::hopper::tuning.grid) {
  cuda::hopper::tuning.grid = grid_beside(target, case_.num_ranks());
  const MoECase& c = case_.layer;
  const std::int64_t largest = *std::max_element(case_.tokens.begin(), case_.tokens.end());
  shape_ = {
      .num_ranks = case_.num_ranks(),
      .max_tokens = std::max<std::int64_t>(case_.max_tokens > 0 ? case_.max_tokens : largest, 1),
      .hidden_size = c.hidden_size,
      .num_experts = c.num_experts,
      .top_k = c.top_k,
      .numerics = Numerics::of(c.dtype)};
  std::int64_t first = 0;
  for (int r = 0; r < case_.num_ranks(); ++r) {
    make_rank(r, first);
    first += case_.tokens[static_cast<std::size_t>(r)];
  }
  std::vector<void*> buffers;
  for (const auto& rank : ranks_) buffers.push_back(aligned(rank->buffer));
  for (int r = 0; r < case_.num_ranks(); ++r) {
    rank(r).exchange.emplace(context(r), shape_, r, buffers,
                             ExchangeOptions{case_.timeout_seconds});
  }
}

ExchangeGroup::~ExchangeGroup() {
  target_.memory->synchronize();
  for (const auto& rank : ranks_) destroy_stream(rank->stream);
  cuda::hopper::tuning.grid = grid_before_;
}

void ExchangeGroup::make_rank(int r, std::int64_t first_token) {
  const MoECase& c = case_.layer;
  const std::int64_t T = case_.tokens[static_cast<std::size_t>(r)], d = c.hidden_size,
                     e = shape_.experts_per_rank();
  auto made = std::make_unique<ExchangeRank>();
  ExchangeRank& m = *made;
  m.stream = make_stream(target_);
  m.x = Tensor(target_, c.dtype, {T, d}, c.x_strides);
  m.x.fill(rows_of(inputs_.x.values(), first_token, T, d));
  m.grad_out = Tensor(target_, c.dtype, {T, d}, c.x_strides);
  m.grad_out.fill(rows_of(inputs_.grad_out.values(), first_token, T, d));
  m.topk_ids = Tensor(target_, c.id_dtype, {T, c.top_k});
  m.topk_ids.fill_ids(rows_of_ids(inputs_.topk_ids.values(), first_token, T, c.top_k));
  m.topk_weights = Tensor(target_, c.routing_weight_dtype, {T, c.top_k});
  m.topk_weights.fill(rows_of(inputs_.routing_weights.values(), first_token, T, c.top_k));
  m.w1 = experts_of(target_, inputs_.w1, r * e, e);
  m.b1 = experts_of(target_, inputs_.b1, r * e, e);
  m.w2 = experts_of(target_, inputs_.w2, r * e, e);
  m.b2 = experts_of(target_, inputs_.b2, r * e, e);
  const MoEShape layer = moe_exchange_shape(shape_, options(), m.weights());
  const Context call = context(r);
  m.out = Tensor(target_, c.dtype, {T, d}, c.x_strides);
  m.grad_x = Tensor(target_, c.dtype, {T, d}, c.x_strides);
  m.h = Tensor(target_, c.dtype, {layer.row_capacity(), c.h_columns()});
  if (case_.keep_received) m.received = Tensor(target_, c.dtype, {shape_.num_places(), d});
  m.rows_dropped = Tensor(target_, DType::kInt32, {1});
  m.grad_w1 = like(target_, m.w1);
  m.grad_b1 = like(target_, m.b1);
  m.grad_w2 = like(target_, m.w2);
  m.grad_b2 = like(target_, m.b2);
  m.grad_routing_weights = Tensor(target_, DType::kFloat32, {T, c.top_k});
  m.metadata = GuardedBuffer(target_, moe_metadata_bytes(layer));
  m.forward_workspace = GuardedBuffer(target_, moe_exchange_forward_workspace(call, shape_, layer));
  m.backward_workspace =
      GuardedBuffer(target_, moe_exchange_backward_workspace(call, shape_, layer));
  m.buffer = GuardedBuffer(target_, exchange_bytes(shape_) + kAlignment);
  ranks_.push_back(std::move(made));
}

ExpertOptions ExchangeGroup::options() const {
  ExpertOptions options = case_.layer.options();
  options.max_rows = case_.max_rows;
  return options;
}

Context ExchangeGroup::context(int r) const {
  Context context = target_.context(1);
  const auto index = static_cast<std::size_t>(r);
  if (index < ranks_.size()) context.stream.handle = ranks_[index]->stream;
  return context;
}

std::vector<std::string> ExchangeGroup::run(const std::function<void(int)>& call) {
  std::vector<std::string> errors(ranks_.size());
  const auto run_one = [&](int r) {
    errors[static_cast<std::size_t>(r)] = error_of([&] { call(r); });
  };
  if (target_.device.type == DeviceType::kCuda) {
    for (int r = 0; r < case_.num_ranks(); ++r) run_one(r);
    target_.memory->synchronize();
    for (int r = 0; r < case_.num_ranks(); ++r) {
      std::string& error = errors[static_cast<std::size_t>(r)];
      if (error.empty()) error = error_of([&] { rank(r).exchange->check(); });
    }
    return errors;
  }
  std::vector<std::thread> threads;
  for (int r = 0; r < case_.num_ranks(); ++r) threads.emplace_back(run_one, r);
  for (std::thread& thread : threads) thread.join();
  return errors;
}

void ExchangeGroup::forward() {
  for (const std::string& error : run([this](int r) { forward(r); })) {
    if (!error.empty()) throw std::runtime_error(error);
  }
}

void ExchangeGroup::backward() {
  for (const std::string& error : run([this](int r) { backward(r); })) {
    if (!error.empty()) throw std::runtime_error(error);
  }
}

void ExchangeGroup::forward(int r) {
  moe_exchange_forward(context(r), *rank(r).exchange, forward_args(r));
}

void ExchangeGroup::backward(int r) {
  moe_exchange_backward(context(r), *rank(r).exchange, backward_args(r));
}

MoEExchangeForwardArgs ExchangeGroup::forward_args(int r) const {
  const ExchangeRank& m = *ranks_[static_cast<std::size_t>(r)];
  return {.options = options(),
          .x = m.x.view(),
          .weights = m.weights(),
          .topk_ids = m.topk_ids.view(),
          .topk_weights = m.topk_weights.view(),
          .out = m.out.view(),
          .h = m.h.view(),
          .metadata = m.metadata.view(),
          .received = m.received.view(),
          .rows_dropped = m.rows_dropped.view(),
          .workspace = m.forward_workspace.view()};
}

MoEExchangeBackwardArgs ExchangeGroup::backward_args(int r) const {
  const ExchangeRank& m = *ranks_[static_cast<std::size_t>(r)];
  return {.options = options(),
          .grad_out = m.grad_out.view(),
          .x = case_.keep_received ? TensorView() : m.x.view(),
          .weights = m.weights(),
          .topk_ids = m.topk_ids.view(),
          .topk_weights = m.topk_weights.view(),
          .h = m.h.view(),
          .metadata = m.metadata.view(),
          .received = m.received.view(),
          .grad_x = m.grad_x.view(),
          .grad_routing_weights = m.grad_routing_weights.view(),
          .grad_w1 = m.grad_w1.view(),
          .grad_b1 = m.grad_b1.view(),
          .grad_w2 = m.grad_w2.view(),
          .grad_b2 = m.grad_b2.view(),
          .workspace = m.backward_workspace.view()};
}

void ExchangeGroup::start_at(std::uint32_t call) {
  ExchangeHeader header{};
  header.call = call;
  for (int r = 0; r < kMostRanks; ++r) {
    header.published[r] = header.ready[r] = packed({call, ExchangeOperation::kForward, 0});
  }
  for (const auto& rank : ranks_) {
    target_.memory->upload(aligned(rank->buffer), &header, sizeof header);
  }
}

RunResult ExchangeGroup::result() const {
  RunResult result;
  for (const auto& rank : ranks_) {
    append(result.out, rank->out);
    append(result.grad_x, rank->grad_x);
    append(result.grad_routing_weights, rank->grad_routing_weights);
    append(result.grad_w1, rank->grad_w1);
    append(result.grad_b1, rank->grad_b1);
    append(result.grad_w2, rank->grad_w2);
    append(result.grad_b2, rank->grad_b2);
    result.rows_dropped += static_cast<std::int64_t>(rank->rows_dropped.values()[0]);
  }
  return result;
}

std::vector<std::string> ExchangeGroup::violations() const {
  std::vector<std::string> found;
  for (std::size_t r = 0; r < ranks_.size(); ++r) {
    const ExchangeRank& m = *ranks_[r];
    const auto note = [&](const char* name, const std::string& what) {
      if (!what.empty()) found.push_back("rank " + std::to_string(r) + ": " + name + ": " + what);
    };
    note("x", m.x.violation_as_input());
    note("grad_out", m.grad_out.violation_as_input());
    note("topk_ids", m.topk_ids.violation_as_input());
    note("topk_weights", m.topk_weights.violation_as_input());
    note("w1", m.w1.violation_as_input());
    note("w2", m.w2.violation_as_input());
    note("out", m.out.violation_as_output());
    note("h", m.h.violation_as_output());
    note("grad_x", m.grad_x.violation_as_output());
    note("grad_w1", m.grad_w1.violation_as_output());
    note("grad_w2", m.grad_w2.violation_as_output());
    note("grad_routing_weights", m.grad_routing_weights.violation_as_output());
    const auto guarded = [&](const char* name, const GuardedBuffer& buffer) {
      note(name, buffer.guards_intact() ? "" : "wrote past an end");
    };
    guarded("metadata", m.metadata);
    guarded("forward workspace", m.forward_workspace);
    guarded("backward workspace", m.backward_workspace);
    guarded("buffer", m.buffer);
  }
  return found;
}

namespace {

// A rank's experts on the tokens of all ranks, by the operations of moe.hpp.
RunResult part_of_rank(const Target& target, const MoEInputs& inputs, const ExchangeRank& rank,
                       const ExpertOptions& options, std::int64_t first_expert) {
  const Context context = target.context(1);
  const MoECase& c = inputs.description;
  const TopKRouting routing{inputs.topk_ids.view(), inputs.routing_weights.view(), first_expert};
  const MoEShape shape = moe_shape(options, inputs.x.view(), rank.weights(), routing);
  const Tensor out(target, c.dtype, {c.num_tokens, c.hidden_size});
  const Tensor h(target, c.dtype, {shape.row_capacity(), c.h_columns()});
  const Tensor rows_dropped(target, DType::kInt32, {1});
  const GuardedBuffer metadata(target, moe_metadata_bytes(shape));
  const GuardedBuffer forward(target, moe_forward_workspace(context, shape).bytes);
  moe_forward(context, {.options = options,
                        .x = inputs.x.view(),
                        .weights = rank.weights(),
                        .routing = routing,
                        .out = out.view(),
                        .h = h.view(),
                        .metadata = metadata.view(),
                        .rows_dropped = rows_dropped.view(),
                        .workspace = forward.view(),
                        .workspace_limit = {}});
  const Tensor grad_x(target, c.dtype, {c.num_tokens, c.hidden_size});
  const Tensor grad_w1 = like(target, rank.w1), grad_b1 = like(target, rank.b1);
  const Tensor grad_w2 = like(target, rank.w2), grad_b2 = like(target, rank.b2);
  const Tensor scores(target, DType::kFloat32, {c.num_tokens, c.top_k});
  const GuardedBuffer backward(target, moe_backward_workspace(context, shape).bytes);
  MoEBackwardArgs args;
  args.options = options;
  args.grad_out = inputs.grad_out.view();
  args.x = inputs.x.view();
  args.weights = rank.weights();
  args.routing = routing;
  args.h = h.view();
  args.metadata = metadata.view();
  args.grad_x = grad_x.view();
  args.grad_w1 = grad_w1.view();
  args.grad_b1 = grad_b1.view();
  args.grad_w2 = grad_w2.view();
  args.grad_b2 = grad_b2.view();
  args.grad_routing_weights = scores.view();
  args.workspace = backward.view();
  moe_backward(context, args);
  target.memory->synchronize();
  RunResult result;
  append(result.out, out);
  append(result.grad_x, grad_x);
  append(result.grad_w1, grad_w1);
  append(result.grad_b1, grad_b1);
  append(result.grad_w2, grad_w2);
  append(result.grad_b2, grad_b2);
  append(result.grad_routing_weights, scores);
  result.rows_dropped = static_cast<std::int64_t>(rows_dropped.values()[0]);
  return result;
}

// The parts of all ranks in rank order, in float32, rounded once; and how far one rounding of the
// whole may lie from it.
Values summed(const std::vector<RunResult>& parts, Values RunResult::* tensor, DType dtype,
              Values& bound) {
  const bool halves = dtype == DType::kBFloat16;
  const double unit = halves ? 0x1p-8 : 0x1p-21;
  const double sums = halves ? 1e-30 : 1e-6;  // of float32 in another order
  const std::size_t size = (parts.front().*tensor).size();
  Values sum(size);
  bound.assign(size, 0.0);
  for (std::size_t i = 0; i < size; ++i) {
    float value = 0.0f;
    for (const RunResult& part : parts) {
      value += static_cast<float>((part.*tensor)[i]);
      bound[i] += unit * std::abs((part.*tensor)[i]);
    }
    sum[i] = static_cast<double>(rounded(value, dtype));
    bound[i] += 2.01 * unit * std::abs(sum[i]) + sums;  // rounded here and there
  }
  return sum;
}

void append(Values& to, const Values& from) { to.insert(to.end(), from.begin(), from.end()); }

}  // namespace

Definition exchange_definition(const Target& target, const ExchangeCase& test_case) {
  ExchangeGroup group(target, test_case);  // for the ranks' experts
  const MoEInputs inputs(target, test_case.layer);
  std::vector<RunResult> parts;
  for (int r = 0; r < test_case.num_ranks(); ++r) {
    parts.push_back(part_of_rank(target, inputs, group.rank(r), group.options(),
                                 r * group.shape().experts_per_rank()));
  }
  Definition definition;
  RunResult& result = definition.result;
  const DType dtype = test_case.layer.dtype;
  result.out = summed(parts, &RunResult::out, dtype, definition.out_bound);
  result.grad_x = summed(parts, &RunResult::grad_x, dtype, definition.grad_x_bound);
  result.grad_routing_weights.assign(parts.front().grad_routing_weights.size(), 0.0);
  for (const RunResult& part : parts) {
    append(result.grad_w1, part.grad_w1);
    append(result.grad_b1, part.grad_b1);
    append(result.grad_w2, part.grad_w2);
    append(result.grad_b2, part.grad_b2);
    result.rows_dropped += part.rows_dropped;
    // Every slot has one owner; the others' are 0.
    for (std::size_t i = 0; i < part.grad_routing_weights.size(); ++i) {
      result.grad_routing_weights[i] += part.grad_routing_weights[i];
    }
  }
  return definition;
}

}  // namespace sonicmoe::rig
