// What the Hopper kernels decline: other dtypes than bf16, and what TMA and 16-byte accesses cannot
// address.
#include <limits>
#include <string>

#include "cuda/element.hpp"
#include "cuda/hopper/products.hpp"
#include "cuda/hopper/select.hpp"

namespace sonicmoe::cuda::hopper {
namespace {

bool aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; }

Reason not_a_multiple(const char* argument, const std::string& what, std::int64_t value,
                      std::int64_t vector = kVectorElements) {
  return Objection{argument, what + " a multiple of " + std::to_string(vector) + " on a GPU",
                   std::to_string(value)};
}

Reason not_aligned(const char* argument) {
  return Objection{argument, "16-byte alignment on a GPU", "an unaligned address"};
}

Reason check_dtype(const char* argument, const ConstTensorView& operand) {
  if (operand.dtype() == DType::kBFloat16) return {};
  return Objection{argument, "bfloat16 on a GPU", std::string(name_of(operand.dtype()))};
}

Reason check_size(const char* argument, const char* what, std::int64_t size) {
  return size % kVectorElements == 0 ? Reason() : not_a_multiple(argument, what, size);
}

Reason check_matrix(const char* name, const Matrix& m, std::int64_t rows) {
  if (!aligned(m.data)) return not_aligned(name);
  if (m.ld % kVectorElements != 0) return not_a_multiple(name, "a row stride", m.ld);
  if (rows * (m.ld / kVectorElements) > std::numeric_limits<std::uint32_t>::max()) {
    return Objection{name, "at most 2^35 elements on a GPU",
                     std::to_string(rows) + " rows of " + std::to_string(m.ld)};
  }
  return {};
}

// A weight or its gradient: one of the last strides 1, everything else in steps of 16 bytes.
Reason check_strided(const char* name, const ConstTensorView& w,
                     std::int64_t vector = kVectorElements) {
  if (!aligned(w.data())) return not_aligned(name);
  const int unit = depth_has_unit_stride(w, 2) ? 2 : 1;
  for (int i = 0; i < 3; ++i) {
    if (i == unit ? w.stride(i) == 1 || w.size(i) == 1
                  : w.stride(i) % vector == 0 || w.size(i) == 1) {
      continue;
    }
    const std::string what = "a stride of dimension " + std::to_string(i);
    return not_a_multiple(name, what, w.stride(i), vector);
  }
  return {};
}

Reason check_gradient(const char* name, const TensorView& w) {
  return check_strided(name, w, w.dtype() == DType::kFloat32 ? 2 : kVectorElements);
}

// A gated concatenated weight needs its second half to start at a multiple of 16 bytes.
Reason check_halves(const HiddenFunction& function, std::int64_t n, const ConstTensorView& w1) {
  const bool concatenated =
      is_gated(function.activation) && function.layout == GateUpLayout::kConcatenated;
  const std::int64_t offset = n * w1.stride(1);
  return concatenated && offset % kVectorElements != 0
             ? not_a_multiple("w1", "the up rows' offset", offset)
             : Reason();
}

// Rows that TMA reads or writes: H, A, dH, A'.
Reason check_rows(const char* name, const void* rows) {
  return aligned(rows) ? Reason() : not_aligned(name);
}

// The first that there is.
template <class... Reasons>
Reason first_of(Reasons... reasons) {
  Reason result;
  ((result ? void() : void(result = reasons)), ...);
  return result;
}

}  // namespace

Reason HopperProducts::reason_against(const ProductCall& call, const UpArgs& args) const {
  const std::int64_t n = args.w1.size(1) / gate_factor(args.function.activation);
  return first_of(check_dtype("x", args.w1), check_size("x", "hidden_size", args.w1.size(2)),
                  check_size("w1", "intermediate_size", n),
                  check_matrix("x", args.x, call.num_tokens), check_strided("w1", args.w1),
                  check_halves(args.function, n, args.w1), check_rows("h", args.h));
}

Reason HopperProducts::reason_against(const ProductCall& call, const GradHArgs& args) const {
  return first_of(check_dtype("grad_out", args.w2),
                  check_size("grad_out", "hidden_size", args.w2.size(1)),
                  check_size("w2", "intermediate_size", args.w2.size(2)),
                  check_matrix("grad_out", args.grad_out, call.num_tokens),
                  check_strided("w2", args.w2), check_rows("h", args.h),
                  check_rows("grad_h", args.grad_h), check_rows("scaled_a", args.scaled_a));
}

Reason HopperProducts::reason_against(const ProductCall&, const RowsArgs& args) const {
  return first_of(check_rows("a", args.a), check_dtype("weight", args.weight),
                  check_size("weight", "a size of dimension 1", args.weight.size(1)),
                  check_size("weight", "a size of dimension 2", args.weight.size(2)),
                  check_strided("weight", args.weight), check_matrix("out", args.out, 0),
                  check_size("workspace_limit", "a slab's first column", args.first_column),
                  check_size("workspace_limit", "a slab's width", args.num_columns));
}

Reason HopperProducts::reason_against(const ProductCall& call,
                                      const WeightGradientArgs& args) const {
  return first_of(check_size("grad", "a size of dimension 1", args.grad.size(1)),
                  check_size("grad", "a size of dimension 2", args.grad.size(2)),
                  check_matrix("gathered", args.gathered, call.num_tokens),
                  check_rows("rows", args.rows), check_gradient("grad", args.grad));
}

Reason HopperProducts::reason_against(const ProductCall&, const LogitsArgs& args) const {
  const auto check = [](const char* name, const ConstTensorView& m) {
    const Matrix rows{const_cast<void*>(m.data()), m.stride(0)};
    const Reason gaps = m.stride(1) == 1 ? Reason() : Objection{name, "unit stride", "another"};
    return first_of(check_dtype(name, m), gaps, check_matrix(name, rows, 0));
  };
  return first_of(check("x", args.x), check("weight", args.weight));
}

}  // namespace sonicmoe::cuda::hopper
