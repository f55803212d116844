#include "rig/tensor.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "oracle/values.hpp"

namespace sonicmoe::rig {
namespace {

constexpr std::size_t kAlignment = 64;

std::vector<std::int64_t> make_strides(const std::vector<std::int64_t>& shape, Strides style) {
  const bool padded = style == Strides::kPadded || style == Strides::kTransposedPadded;
  const bool exchange = style == Strides::kTransposed || style == Strides::kTransposedPadded;
  std::vector<std::size_t> order;  // dimensions from the fastest in memory to the slowest
  for (std::size_t dim = shape.size(); dim-- > 0;) order.push_back(dim);
  if (exchange && shape.size() >= 2) std::swap(order[0], order[1]);
  std::vector<std::int64_t> strides(shape.size());
  std::int64_t step = 1;
  for (const std::size_t dim : order) {
    strides[dim] = step;
    step = step * std::max<std::int64_t>(shape[dim], 1) + (padded ? 3 : 0);
  }
  return strides;
}

std::size_t start_of(Strides style, DType dtype) {
  const bool padded = style == Strides::kPadded || style == Strides::kTransposedPadded;
  return padded ? size_of(dtype) : 0;
}

}  // namespace

std::vector<std::byte> poison(std::size_t bytes) {
  std::vector<std::byte> pattern(bytes);
  for (std::size_t i = 0; i < bytes; ++i) pattern[i] = i % 2 ? std::byte{0xFF} : std::byte{0xF5};
  return pattern;
}

GuardedBuffer::GuardedBuffer(const Target& target, std::size_t bytes)
    : target_(&target), bytes_(bytes) {
  const std::size_t total = bytes + 2 * kGuardBytes;
  base_ = static_cast<std::byte*>(target.memory->allocate(total, kAlignment));
  target.memory->upload(base_, poison(total).data(), total);
  forbid_guards();
}

GuardedBuffer::~GuardedBuffer() {
  if (base_ == nullptr) return;
  permit_guards();
  target_->memory->release(base_);
}

GuardedBuffer::GuardedBuffer(GuardedBuffer&& other) noexcept { *this = std::move(other); }

GuardedBuffer& GuardedBuffer::operator=(GuardedBuffer&& other) noexcept {
  std::swap(target_, other.target_);
  std::swap(base_, other.base_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

void GuardedBuffer::forbid_guards() const {
  target_->memory->forbid(base_, kGuardBytes);
  target_->memory->forbid(base_ + kGuardBytes + bytes_, kGuardBytes);
}

void GuardedBuffer::permit_guards() const {
  target_->memory->permit(base_, kGuardBytes);
  target_->memory->permit(base_ + kGuardBytes + bytes_, kGuardBytes);
}

void GuardedBuffer::upload(const std::vector<std::byte>& payload) {
  if (bytes_ > 0) target_->memory->upload(data(), payload.data(), bytes_);
}

std::vector<std::byte> GuardedBuffer::download() const {
  std::vector<std::byte> payload(bytes_);
  if (bytes_ > 0) target_->memory->download(payload.data(), data(), bytes_);
  return payload;
}

bool GuardedBuffer::holds(const std::vector<std::byte>& payload) const {
  return payload.size() == bytes_ &&
         (bytes_ == 0 || target_->memory->equal(data(), payload.data(), bytes_));
}

bool GuardedBuffer::guards_intact() const {
  if (base_ == nullptr) return true;
  static const std::vector<std::byte> pattern = poison(kGuardBytes + 1);
  permit_guards();
  const bool intact = target_->memory->equal(base_, pattern.data(), kGuardBytes) &&
                      target_->memory->equal(base_ + kGuardBytes + bytes_,
                                             pattern.data() + bytes_ % 2, kGuardBytes);
  forbid_guards();
  return intact;
}

TensorView GuardedBuffer::view() const {
  if (base_ == nullptr) return {};
  return TensorView(data(), DType::kUInt8, {static_cast<std::int64_t>(bytes_)},
                    target_ == nullptr ? Device{} : target_->device);
}

const char* name_of(Strides strides) {
  switch (strides) {
    case Strides::kContiguous:
      return "contiguous";
    case Strides::kPadded:
      return "padded";
    case Strides::kTransposed:
      return "transposed";
    case Strides::kTransposedPadded:
      return "transposed_padded";
  }
  return "?";
}

Tensor::Tensor(const Target& target, DType dtype, std::vector<std::int64_t> shape, Strides style)
    : Tensor(target, dtype, shape, make_strides(shape, style), start_of(style, dtype)) {}

Tensor::Tensor(const Target& target, DType dtype, std::vector<std::int64_t> shape,
               std::vector<std::int64_t> strides, std::size_t start)
    : start_(start) {
  std::size_t bytes = start_;
  if (std::find(shape.begin(), shape.end(), 0) == shape.end()) {
    std::int64_t last = 0;
    for (std::size_t i = 0; i < shape.size(); ++i) last += (shape[i] - 1) * strides[i];
    bytes += (static_cast<std::size_t>(last) + 1) * size_of(dtype);
  }
  buffer_ = GuardedBuffer(target, bytes);
  image_ = poison(bytes);
  view_ = TensorView(static_cast<std::byte*>(buffer_.data()) + start_, dtype,
                     std::span<const std::int64_t>(shape), std::span<const std::int64_t>(strides),
                     target.device);
}

std::size_t Tensor::byte_offset(std::int64_t index) const {
  std::int64_t offset = 0;
  for (int dim = view_.rank() - 1; dim >= 0; --dim) {
    offset += index % view_.size(dim) * view_.stride(dim);
    index /= view_.size(dim);
  }
  return start_ + static_cast<std::size_t>(offset) * size_of(dtype());
}

template <class Write>
void Tensor::rewrite(Write write) {
  for (std::int64_t i = 0; i < numel(); ++i) write(image_.data() + byte_offset(i), i);
  buffer_.upload(image_);
}

void Tensor::fill(const std::vector<double>& values) {
  rewrite([&](std::byte* element, std::int64_t i) {
    const auto value = static_cast<float>(values[static_cast<std::size_t>(i)]);
    if (dtype() == DType::kFloat32) {
      std::memcpy(element, &value, sizeof value);
    } else {
      const bfloat16 narrow(value);
      std::memcpy(element, &narrow, sizeof narrow);
    }
  });
}

void Tensor::fill_constant(double value) {
  fill(std::vector<double>(static_cast<std::size_t>(numel()), value));
}

void Tensor::fill_ids(const std::vector<std::int64_t>& ids) {
  rewrite([&](std::byte* element, std::int64_t i) {
    const std::int64_t id = ids[static_cast<std::size_t>(i)];
    if (dtype() == DType::kInt64) {
      std::memcpy(element, &id, sizeof id);
    } else if (dtype() == DType::kUInt8) {
      *element = static_cast<std::byte>(id);
    } else {
      const auto narrow = static_cast<std::int32_t>(id);
      std::memcpy(element, &narrow, sizeof narrow);
    }
  });
}

std::vector<double> Tensor::values() const {
  const std::vector<std::byte> payload = buffer_.download();
  const auto rank = static_cast<std::size_t>(view_.rank());
  std::vector<std::int64_t> strides(rank);
  for (std::size_t i = 0; i < rank; ++i) strides[i] = view_.stride(static_cast<int>(i));
  return oracle::to_double(ConstTensorView(payload.data() + start_, dtype(), view_.shape(),
                                           std::span<const std::int64_t>(strides)));
}

std::string Tensor::violation_as_output() const {
  if (!defined()) return {};
  if (!buffer_.guards_intact()) return "wrote outside its buffer";
  if (start_ == 0 && view_.is_contiguous()) return {};  // no gaps
  // Put the poison back into the elements; whatever still differs lies in a gap.
  std::vector<std::byte> payload = buffer_.download();
  const std::vector<std::byte> pattern = poison(payload.size());
  for (std::int64_t i = 0; i < numel(); ++i) {
    const std::size_t offset = byte_offset(i);
    std::copy_n(pattern.data() + offset, size_of(dtype()), payload.data() + offset);
  }
  return payload == pattern ? "" : "wrote between its elements";
}

std::string Tensor::violation_as_input() const {
  if (!defined()) return {};
  if (!buffer_.guards_intact()) return "wrote outside an input";
  return buffer_.holds(image_) ? "" : "changed an input";
}

}  // namespace sonicmoe::rig
