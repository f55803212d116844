#include "core/check.hpp"

#include <algorithm>

#include "core/integers.hpp"
#include "core/layout.hpp"

namespace sonicmoe {
namespace {

template <class Range>
std::string join(const Range& values) {
  std::string text;
  for (const std::int64_t value : values)
    text += (text.empty() ? "" : ", ") + std::to_string(value);
  return "[" + text + "]";
}

std::string strides_of(const ConstTensorView& view) {
  std::string text = "strides (";
  for (int i = 0; i < view.rank(); ++i) text += (i ? ", " : "") + std::to_string(view.stride(i));
  return text + ")";
}

}  // namespace

Check::Check(std::string_view operation, const Context& context)
    : Check(operation, context.device) {
  constexpr int kMostThreads = 1 << 16;
  between("num_threads", context.num_threads, 0, kMostThreads);
  const DeviceType type = context.device.type;
  that(type == DeviceType::kCpu || type == DeviceType::kCuda, "device", "a CPU or CUDA device",
       to_string(context.device));
  that(context.device.index >= 0 && (type == DeviceType::kCuda || context.device.index == 0),
       "device", "an ordinal >= 0, 0 for the CPU", std::to_string(context.device.index));
}

void Check::device(const char* argument, const ConstTensorView& view) const {
  if (view.device() != device_) {
    fail(argument, "a tensor on " + to_string(device_), "one on " + to_string(view.device()));
  }
}

void Check::defined(const char* argument, const ConstTensorView& view) const {
  if (!view.defined()) fail(argument, "a tensor", "no tensor");
  device(argument, view);
}

void Check::between(const char* argument, std::int64_t value, std::int64_t least,
                    std::int64_t most) const {
  if (value >= least && value <= most) return;
  fail(argument, std::to_string(least) + ".." + std::to_string(most), std::to_string(value));
}

std::int64_t Check::product(const char* argument,
                            std::initializer_list<std::int64_t> factors) const {
  constexpr std::int64_t kMost = std::int64_t{1} << 59;
  std::int64_t product = 1;
  std::string text;
  for (const std::int64_t factor : factors) {
    if (factor == 0) return 0;
    product = saturating_mul(product, factor);
  }
  if (product <= kMost) return product;
  for (const std::int64_t factor : factors) {
    text += (text.empty() ? "" : " * ") + std::to_string(factor);
  }
  fail(argument, "at most 2^59 elements", text);
}

void Check::rank(const char* argument, const ConstTensorView& view, int rank) const {
  defined(argument, view);
  if (view.rank() != rank) fail(argument, std::to_string(rank) + " dimensions", view.describe());
}

void Check::shape(const char* argument, const ConstTensorView& view,
                  std::initializer_list<std::int64_t> shape) const {
  defined(argument, view);
  bool equal = view.rank() == static_cast<int>(shape.size());
  for (int i = 0; equal && i < view.rank(); ++i) equal = view.size(i) == shape.begin()[i];
  if (!equal) fail(argument, "shape " + join(shape), view.describe());
}

void Check::shape_like(const char* argument, const ConstTensorView& view,
                       const ConstTensorView& other) const {
  defined(argument, view);
  bool equal = view.rank() == other.rank();
  for (int i = 0; equal && i < view.rank(); ++i) equal = view.size(i) == other.size(i);
  if (!equal) fail(argument, "shape " + join(other.shape()), view.describe());
}

void Check::dtype(const char* argument, const ConstTensorView& view,
                  std::initializer_list<DType> allowed) const {
  defined(argument, view);
  if (std::find(allowed.begin(), allowed.end(), view.dtype()) != allowed.end()) return;
  std::string names;
  for (const DType dtype : allowed) {
    names += (names.empty() ? "" : " or ") + std::string(name_of(dtype));
  }
  fail(argument, names, std::string(name_of(view.dtype())));
}

void Check::contiguous(const char* argument, const ConstTensorView& view) const {
  if (!view.is_contiguous()) fail(argument, "a contiguous tensor", strides_of(view));
}

void Check::unit_stride(const char* argument, const ConstTensorView& view, int dim) const {
  if (view.size(dim) > 1 && view.stride(dim) != 1) {
    fail(argument, "stride 1 in dimension " + std::to_string(dim), strides_of(view));
  }
}

void Check::unit_stride_in_a_matrix_dim(const char* argument, const ConstTensorView& view) const {
  for (const int dim : {view.rank() - 1, view.rank() - 2}) {
    if (view.size(dim) <= 1 || view.stride(dim) == 1) return;
  }
  fail(argument, "stride 1 in one of the last two dimensions", strides_of(view));
}

void Check::buffer(const char* argument, const ConstTensorView& view, std::size_t bytes,
                   std::size_t alignment) const {
  if (bytes == 0 && !view.defined()) return;
  dtype(argument, view, {DType::kUInt8});
  contiguous(argument, view);
  if (view.nbytes() < bytes) {
    fail(argument, "at least " + std::to_string(bytes) + " bytes", std::to_string(view.nbytes()));
  }
  if (reinterpret_cast<std::uintptr_t>(view.data()) % alignment != 0) {
    fail(argument, std::to_string(alignment) + "-byte alignment", "an unaligned address");
  }
}

void CallMemory::add(const char* argument, const ConstTensorView& view, Access access) {
  if (!view.defined()) return;
  check_.device(argument, view);
  const std::size_t bytes = view.span_bytes();
  if (bytes == 0) return;
  const auto first = reinterpret_cast<std::uintptr_t>(view.data());
  const std::size_t width = size_of(view.dtype());
  if (first % width != 0) {
    check_.fail(argument,
                "an address aligned to its elements of " + std::to_string(width) + " bytes",
                "an unaligned address");
  }
  const bool written = access == Access::kWrite;
  if (written && !Layout(view).distinct()) {
    check_.fail(argument, "distinct elements, since they are written", strides_of(view));
  }
  if (count_ == kMostTensors) throw Error(check_.operation() + ": too many tensors");
  tensors_[count_++] = {argument, &view, first, first + bytes, written};
}

void CallMemory::check_overlaps() const {
  for (std::size_t i = 0; i < count_; ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      const Tensor& a = tensors_[i];
      const Tensor& b = tensors_[j];
      if (a.first >= b.end || b.first >= a.end || (!a.written && !b.written)) continue;
      const auto offset = static_cast<std::int64_t>(b.first - a.first);
      if (!share_bytes(Layout(*a.view), Layout(*b.view), offset)) continue;
      const Tensor& output = a.written ? a : b;
      check_.fail(output.argument, "memory of its own, since it is written",
                  std::string("memory shared with ") + (a.written ? b : a).argument);
    }
  }
}

}  // namespace sonicmoe
