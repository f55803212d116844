#include "sonicmoe/tensor.hpp"

#include "sonicmoe/error.hpp"

namespace sonicmoe {
namespace {

std::array<std::int64_t, kMaxRank> row_major_strides(std::span<const std::int64_t> shape) {
  std::array<std::int64_t, kMaxRank> strides{};
  std::int64_t step = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    if (i < strides.size()) strides[i] = step;
    step *= shape[i];
  }
  return strides;
}

}  // namespace

ConstTensorView::ConstTensorView(const void* data, DType dtype, std::span<const std::int64_t> shape)
    : ConstTensorView(
          data, dtype, shape,
          std::span<const std::int64_t>(row_major_strides(shape).data(), shape.size())) {}

ConstTensorView::ConstTensorView(const void* data, DType dtype, std::span<const std::int64_t> shape,
                                 std::span<const std::int64_t> strides)
    : data_(data), dtype_(dtype), rank_(static_cast<int>(shape.size())) {
  if (shape.empty() || shape.size() > kMaxRank) {
    throw Error("tensor", "shape", "1 to " + std::to_string(kMaxRank) + " dimensions",
                std::to_string(shape.size()));
  }
  if (strides.size() != shape.size()) {
    throw Error("tensor", "strides", std::to_string(shape.size()) + " strides",
                std::to_string(strides.size()));
  }
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] < 0) throw Error("tensor", "shape", "extents >= 0", std::to_string(shape[i]));
    shape_[i] = shape[i];
    strides_[i] = strides[i];
  }
  if (data == nullptr && numel() > 0) {
    throw Error("tensor", "data", "a pointer to " + describe(), "null");
  }
}

std::int64_t ConstTensorView::numel() const noexcept {
  if (rank_ == 0) return 0;
  std::int64_t product = 1;
  for (const std::int64_t extent : shape()) product *= extent;
  return product;
}

std::size_t ConstTensorView::nbytes() const noexcept {
  return static_cast<std::size_t>(numel()) * size_of(dtype_);
}

bool ConstTensorView::is_contiguous() const noexcept {
  if (numel() == 0) return true;
  std::int64_t step = 1;
  for (int i = rank_ - 1; i >= 0; --i) {
    if (size(i) > 1 && stride(i) != step) return false;
    step *= size(i);
  }
  return true;
}

std::string ConstTensorView::describe() const {
  if (!defined()) return "no tensor";
  std::string text(name_of(dtype_));
  text += '[';
  for (int i = 0; i < rank_; ++i) text += (i ? ", " : "") + std::to_string(size(i));
  text += ']';
  return text;
}

}  // namespace sonicmoe
