// The backend of last resort: the float64 oracle, rounded once into the caller's tensors. It serves
// the CPU everywhere, allocates float64 copies of its inputs and is orders of magnitude slower than
// the cpu backend; its use is to be compared with.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "oracle/experts.hpp"
#include "router/host_router.hpp"
#include "sonicmoe/error.hpp"

namespace sonicmoe {
namespace {

void write_element(const TensorView& view, std::int64_t offset, double value, bool add) {
  if (view.dtype() == DType::kFloat32) {
    float& element = view.as<float>()[offset];
    element = static_cast<float>(add ? static_cast<double>(element) + value : value);
  } else {
    bfloat16& element = view.as<bfloat16>()[offset];
    element = bfloat16(static_cast<float>(add ? static_cast<float>(element) + value : value));
  }
}

// Rounds row-major `values` into a strided float32 or bfloat16 view, or adds them to it. An absent
// view takes nothing.
void write(const TensorView& view, const std::vector<double>& values, bool add = false) {
  if (!view.defined()) return;
  for (std::size_t i = 0; i < values.size(); ++i) {
    auto rest = static_cast<std::int64_t>(i);
    std::int64_t offset = 0;
    for (int dim = view.rank() - 1; dim >= 0; --dim) {
      offset += rest % view.size(dim) * view.stride(dim);
      rest /= view.size(dim);
    }
    write_element(view, offset, values[i], add);
  }
}

// Routing metadata kept for backward: ends [E], and per row of H its input position and its token
// (sorted rows need neither: both equal the row).
struct Metadata {
  std::int32_t* ends;       // [E]
  std::int32_t* positions;  // [P]
  std::int32_t* tokens;     // [P]

  Metadata(void* base, const MoEShape& shape)
      : ends(static_cast<std::int32_t*>(base)),
        positions(ends + shape.num_experts),
        tokens(positions + shape.num_pairs) {}
};

void write_metadata(const TensorView& view, const MoEShape& shape,
                    const std::vector<oracle::Row>& rows) {
  const Metadata metadata(view.data(), shape);
  std::fill_n(metadata.ends, shape.num_experts, 0);
  for (std::size_t r = 0; r < rows.size(); ++r) {
    for (std::int64_t e = rows[r].expert; e < shape.num_experts; ++e) ++metadata.ends[e];
    if (shape.form == MoEShape::Form::kSorted) continue;
    metadata.positions[r] = static_cast<std::int32_t>(rows[r].position);
    metadata.tokens[r] = static_cast<std::int32_t>(rows[r].token);
  }
}

std::vector<oracle::Row> read_metadata(const ConstTensorView& view, const MoEShape& shape) {
  const Metadata metadata(const_cast<void*>(view.data()), shape);
  const auto require = [](bool holds) {
    if (!holds) {
      throw Error("moe_backward", "metadata", "what moe_forward wrote for this call",
                  "indices out of range");
    }
  };
  const auto in = [](std::int32_t index, std::int64_t end) { return index >= 0 && index < end; };
  std::vector<oracle::Row> rows;
  for (std::int64_t e = 0; e < shape.num_experts; ++e) {
    require(in(metadata.ends[e], shape.num_pairs + 1));
    for (auto r = static_cast<std::int64_t>(rows.size()); r < metadata.ends[e]; ++r) {
      if (shape.form == MoEShape::Form::kSorted) {
        rows.push_back({r, r, e});
      } else {
        rows.push_back({metadata.positions[r], metadata.tokens[r], e});
        require(in(metadata.positions[r], shape.num_pairs) &&
                in(metadata.tokens[r], shape.num_tokens));
      }
    }
  }
  return rows;
}

void check_offsets(const Routing& routing, std::int64_t num_pairs) {
  const auto* sorted = std::get_if<SortedRouting>(&routing);
  if (sorted == nullptr) return;
  const std::vector<double> ends = oracle::to_double(sorted->offsets);
  double previous = 0.0;
  for (std::size_t e = 0; e < ends.size(); ++e) {
    if (ends[e] < previous || ends[e] > static_cast<double>(num_pairs)) {
      throw Error(
          "moe_forward", "offsets", "non-decreasing ends from 0 to " + std::to_string(num_pairs),
          std::to_string(static_cast<std::int64_t>(ends[e])) + " at expert " + std::to_string(e));
    }
    previous = ends[e];
  }
}

class ReferenceBackend final : public HostRouterBackend {
 public:
  std::string_view name() const override { return "reference"; }
  std::string description() const override { return "float64 loops, 1 thread"; }
  bool serves(DeviceType type) const override { return type == DeviceType::kCpu; }

  // The oracle brings its own memory, so there is nothing a limit could bound: one slab, no bytes
  // beyond a token amount.
  WorkspacePlan moe_forward_workspace(const Context&, const MoEShape& shape, bool,
                                      std::optional<std::size_t> limit) const override {
    return plan("moe_forward_workspace", shape, limit);
  }
  WorkspacePlan moe_backward_workspace(const Context&, const MoEShape& shape,
                                       std::optional<std::size_t> limit) const override {
    return plan("moe_backward_workspace", shape, limit);
  }

  void moe_forward(const Context&, const MoEShape& shape,
                   const MoEForwardArgs& args) const override {
    check_offsets(args.routing, shape.num_pairs);
    // H is rounded as if stored in inference too: the same bits with and without it.
    const oracle::ForwardResult result = oracle::forward(
        {args.options, args.x, args.weights, args.routing}, oracle::Storage::kHidden);
    write(args.out, result.out);
    write(args.h, result.h);
    if (args.metadata.defined()) write_metadata(args.metadata, shape, result.rows);
  }

  void moe_backward(const Context&, const MoEShape& shape, const MoEBackwardArgs& args,
                    RouterShare* router) const override {
    const std::vector<oracle::Row> rows = read_metadata(args.metadata, shape);
    oracle::BackwardResult result =
        oracle::backward({args.options, args.x, args.weights, args.routing}, rows,
                         oracle::to_double(args.h), args.grad_out);
    write(args.grad_routing_weights, result.grad_routing_weights);
    // The router may still refuse the ids: before anything is added to the caller's gradients.
    if (router != nullptr) {
      router->compute_grad_logits();
      const std::vector<double> share =
          oracle::router_grad_x(oracle::to_double(router->grad_logits), router->router_weight);
      for (std::size_t i = 0; i < share.size(); ++i) result.grad_x[i] += share[i];
    }
    write(args.grad_x, result.grad_x);
    write(args.grad_w1, result.grad_w1, args.accumulate);
    write(args.grad_b1, result.grad_b1, args.accumulate);
    write(args.grad_w2, result.grad_w2, args.accumulate);
    write(args.grad_b2, result.grad_b2, args.accumulate);
  }

  void router_logits(const Context&, ConstTensorView x, ConstTensorView weight,
                     ConstTensorView bias, TensorView logits, TensorView) const override {
    write(logits, oracle::router_logits(x, weight, bias));
  }
  void router_logits_backward(const Context&, ConstTensorView x, ConstTensorView grad_logits,
                              TensorView grad_weight, TensorView grad_bias, bool accumulate,
                              TensorView) const override {
    const oracle::RouterGradients result =
        oracle::router_gradients(oracle::to_double(grad_logits), grad_logits.size(1), x);
    write(grad_weight, result.weight, accumulate);
    write(grad_bias, result.bias, accumulate);
  }
  std::size_t router_logits_workspace_bytes(const Context&, const MoEShape&) const override {
    return 0;
  }

 private:
  static WorkspacePlan plan(const char* operation, const MoEShape& shape,
                            std::optional<std::size_t> limit) {
    constexpr std::size_t kBytes = 64;
    if (limit && *limit < kBytes) {
      throw Error(operation, "workspace_limit", "at least " + std::to_string(kBytes) + " bytes",
                  std::to_string(*limit));
    }
    return {kBytes, kBytes, shape.hidden_size, 1};
  }
};

}  // namespace

std::unique_ptr<Backend> make_reference_backend() { return std::make_unique<ReferenceBackend>(); }

}  // namespace sonicmoe
