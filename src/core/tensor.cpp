#include "sonicmoe/tensor.hpp"

#include "core/integers.hpp"
#include "sonicmoe/error.hpp"

namespace sonicmoe {
namespace {

std::array<std::int64_t, kMaxRank> row_major_strides(std::span<const std::int64_t> shape) {
  std::array<std::int64_t, kMaxRank> strides{};
  std::int64_t step = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    if (i < strides.size()) strides[i] = step;
    step = saturating_mul(step, shape[i]);
  }
  return strides;
}

void check_rank(std::size_t extents, std::size_t strides) {
  if (extents < 1 || extents > kMaxRank) {
    throw Error("tensor", "shape", "1 to " + std::to_string(kMaxRank) + " dimensions",
                std::to_string(extents));
  }
  if (strides != extents) {
    throw Error("tensor", "strides", std::to_string(extents) + " strides", std::to_string(strides));
  }
}

void check_negative(const char* argument, std::span<const std::int64_t> values) {
  for (const std::int64_t value : values) {
    if (value < 0) throw Error("tensor", argument, "numbers >= 0", std::to_string(value));
  }
}

}  // namespace

std::string to_string(const Device& device) {
  switch (device.type) {
    case DeviceType::kCpu:
      return "cpu";
    case DeviceType::kCuda:
      return "cuda:" + std::to_string(device.index);
  }
  return "an unknown device";
}

ConstTensorView::ConstTensorView(const void* data, DType dtype, std::span<const std::int64_t> shape,
                                 Device device)
    : ConstTensorView(data, dtype, shape,
                      std::span<const std::int64_t>(row_major_strides(shape).data(), shape.size()),
                      device) {}

ConstTensorView::ConstTensorView(const void* data, DType dtype, std::span<const std::int64_t> shape,
                                 std::span<const std::int64_t> strides, Device device)
    : data_(data), device_(device), dtype_(dtype), rank_(static_cast<int>(shape.size())) {
  check_rank(shape.size(), strides.size());
  if (size_of(dtype) == 0) {
    throw Error("tensor", "dtype", "an enumerator of DType",
                std::to_string(static_cast<int>(dtype)));
  }
  check_negative("shape", shape);  // first: strides may follow from it
  check_negative("strides", strides);
  std::int64_t elements = 1, last = 0;  // how many, and the offset of the last
  bool empty = false;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    shape_[i] = shape[i];
    strides_[i] = strides[i];
    empty = empty || shape[i] == 0;
    elements = saturating_mul(elements, shape[i]);
    last = saturating_add(last, saturating_mul(shape[i] - 1, strides[i]));
  }
  if (empty) return;
  const auto width = static_cast<std::int64_t>(size_of(dtype));
  if (saturated(saturating_mul(elements, width)) ||
      saturated(saturating_mul(saturating_add(last, 1), width))) {
    throw Error("tensor", "shape", "fewer than 2^63 bytes", describe());
  }
  if (data == nullptr) throw Error("tensor", "data", "a pointer to " + describe(), "null");
}

std::int64_t ConstTensorView::numel() const noexcept {
  if (rank_ == 0) return 0;
  std::int64_t product = 1;
  for (const std::int64_t extent : shape()) {
    if (extent == 0) return 0;
    product = saturating_mul(product, extent);  // exact: the constructor has seen it fit
  }
  return product;
}

std::size_t ConstTensorView::nbytes() const noexcept {
  return static_cast<std::size_t>(numel()) * size_of(dtype_);
}

std::size_t ConstTensorView::span_bytes() const noexcept {
  if (numel() == 0) return 0;
  std::int64_t last = 0;
  for (int i = 0; i < rank_; ++i) last += (size(i) - 1) * stride(i);
  return static_cast<std::size_t>(last + 1) * size_of(dtype_);
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
