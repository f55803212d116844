#include "gradients.hpp"

#include <algorithm>
#include <string>

#include "kept_memory.hpp"

namespace sonicmoe_torch {

Gradients::Gradients(const Views& views, const Tensor& like, const Needs& needs, std::size_t count,
                     std::span<const Tensor> main_grads, std::size_t inputs)
    : views_(views), like_(like), needs_(needs), main_grads_(main_grads) {
  const auto refuse = [&](const char* argument, std::size_t expected, std::size_t got) {
    throw sonicmoe::Error(views.operation(), argument, std::to_string(expected) + " values",
                          std::to_string(got));
  };
  if (needs.size() != count) refuse("needs", count, needs.size());
  if (main_grads.empty()) return;
  const auto first = needs.begin() + static_cast<std::ptrdiff_t>(inputs);
  const auto wanted = static_cast<std::size_t>(std::count(first, needs.end(), true));
  if (main_grads.size() != wanted) refuse("main_grads", wanted, main_grads.size());
}

bool Gradients::next(const char* name, const OptionalTensor& of) {
  const bool need = needs_[next_need_++];
  if (need && !of) {
    throw sonicmoe::Error(views_.operation(), "needs",
                          std::string("false for ") + name + ", as the tensor is absent", "true");
  }
  return need;
}

Gradient Gradients::fresh(const char* name, const Tensor& tensor) const {
  return {tensor, views_.out(name, tensor)};
}

Gradient Gradients::in_buffer(const char* name) {
  return {nothing(like_), views_.out(name, main_grads_[next_buffer_++])};
}

Gradient Gradients::of_input(const char* name, const Tensor& input) {
  if (!next(name, input)) return {nothing(like_), {}};
  const Tensor tensor = new_like_contiguous(input, input.scalar_type());
  return {tensor, views_.out_rows(name, tensor)};
}

Gradient Gradients::of_weight(const char* name, const OptionalTensor& weight) {
  if (!next(name, weight)) return {nothing(weight ? *weight : like_), {}};
  return accumulate() ? in_buffer(name) : fresh(name, new_kept_like(*weight));
}

Gradient Gradients::of_bias(const char* name, const OptionalTensor& bias) {
  if (!next(name, bias)) return {nothing(like_), {}};
  return accumulate() ? in_buffer(name)
                      : fresh(name, new_like_contiguous(*bias, bias->scalar_type()));
}

HandedOn new_handed_on(const Views& views, const Call& call, const Tensor& x,
                       const sonicmoe::MoEShape& shape) {
  const std::size_t bytes =
      views.ask([&] { return sonicmoe::moe_row_lists_bytes(call.context(), shape); });
  return {.grad_h = new_kept(x, {shape.row_capacity(), shape.h_columns()}, x.scalar_type()),
          .scaled_a = new_kept(x, {shape.row_capacity(), shape.intermediate_size}, x.scalar_type()),
          .row_lists = new_bytes(x, bytes)};
}

Gradient Gradients::of_routing_weights(const char* name, const OptionalTensor& weights) {
  if (!next(name, weights)) return {new_tensor(like_, {0}, ScalarType::Float), {}};
  return fresh(name, new_like_contiguous(*weights, ScalarType::Float));
}

}  // namespace sonicmoe_torch
