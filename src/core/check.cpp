#include "core/check.hpp"

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

void Check::defined(const char* argument, const ConstTensorView& view) const {
  if (!view.defined()) fail(argument, "a tensor", "no tensor");
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
  std::string names;
  for (const DType dtype : allowed) {
    if (view.dtype() == dtype) return;
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

}  // namespace sonicmoe
