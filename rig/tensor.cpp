#include "rig/tensor.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "oracle/values.hpp"

namespace sonicmoe::rig {
namespace {

constexpr std::size_t kPatternBytes = std::size_t{1} << 20;  // uploaded, then copied on the device
constexpr std::size_t kRandomPeriod = 16777213;              // the largest prime below 2^24

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

// `done` bytes hold the first periods of a pattern; continues it up to `total`.
void repeat_pattern(DeviceMemory& memory, std::byte* data, std::size_t done, std::size_t total) {
  while (done > 0 && done < total) {
    const std::size_t bytes = std::min(done, total - done);
    memory.copy(data + done, data, bytes);
    done += bytes;
  }
}

}  // namespace

std::vector<std::byte> poison(std::size_t bytes) {
  std::vector<std::byte> pattern(bytes);
  for (std::size_t i = 0; i < bytes; ++i) pattern[i] = i % 2 ? std::byte{0xFF} : std::byte{0xF5};
  return pattern;
}

bool is_poison(double value, DType dtype) {
  if (dtype == DType::kBFloat16) return bfloat16(static_cast<float>(value)).bits == 0xFFF5;
  return std::bit_cast<std::uint32_t>(static_cast<float>(value)) == 0xFFF5FFF5u;
}

GuardedBuffer::GuardedBuffer(const Target& target, std::size_t bytes)
    : memory_(target.memory), device_(target.device), bytes_(bytes) {
  const std::size_t total = bytes + 2 * kGuardBytes;
  base_ = static_cast<std::byte*>(memory_->allocate(total));
  const std::vector<std::byte> pattern = poison(std::min(total, kPatternBytes));
  memory_->upload(base_, pattern.data(), pattern.size());
  repeat_pattern(*memory_, base_, pattern.size(), total);
  forbid_guards();
}

GuardedBuffer::~GuardedBuffer() {
  if (base_ == nullptr) return;
  permit_guards();
  memory_->release(base_, bytes_ + 2 * kGuardBytes);
}

GuardedBuffer::GuardedBuffer(GuardedBuffer&& other) noexcept { *this = std::move(other); }

GuardedBuffer& GuardedBuffer::operator=(GuardedBuffer&& other) noexcept {
  std::swap(memory_, other.memory_);
  std::swap(device_, other.device_);
  std::swap(base_, other.base_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

void GuardedBuffer::forbid_guards() const {
  memory_->forbid(base_, kGuardBytes);
  memory_->forbid(base_ + kGuardBytes + bytes_, kGuardBytes);
}

void GuardedBuffer::permit_guards() const {
  memory_->permit(base_, kGuardBytes);
  memory_->permit(base_ + kGuardBytes + bytes_, kGuardBytes);
}

void GuardedBuffer::upload(std::span<const std::byte> payload) {
  const std::size_t bytes = std::min(bytes_, payload.size());
  if (bytes > 0) memory_->upload(data(), payload.data(), bytes);
}

std::vector<std::byte> GuardedBuffer::download() const {
  std::vector<std::byte> payload(bytes_);
  read(payload.data(), 0, bytes_);
  return payload;
}

void GuardedBuffer::read(void* to, std::size_t first, std::size_t bytes) const {
  if (bytes > 0) memory_->download(to, base_ + kGuardBytes + first, bytes);
}

void GuardedBuffer::repeat(std::size_t period) {
  repeat_pattern(*memory_, base_ + kGuardBytes, period, bytes_);
}

bool GuardedBuffer::holds(const std::vector<std::byte>& payload) const {
  return payload.size() == bytes_ &&
         (bytes_ == 0 || memory_->equal(data(), payload.data(), bytes_));
}

bool GuardedBuffer::guards_intact() const {
  if (base_ == nullptr) return true;
  static const std::vector<std::byte> pattern = poison(kGuardBytes + 1);
  permit_guards();
  const bool intact =
      memory_->equal(base_, pattern.data(), kGuardBytes) &&
      memory_->equal(base_ + kGuardBytes + bytes_, pattern.data() + bytes_ % 2, kGuardBytes);
  forbid_guards();
  return intact;
}

TensorView GuardedBuffer::view() const {
  if (base_ == nullptr) return {};
  return TensorView(data(), DType::kUInt8, {static_cast<std::int64_t>(bytes_)}, device_);
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
  image();
  for (std::int64_t i = 0; i < numel(); ++i) write(image_.data() + byte_offset(i), i);
  buffer_.upload(image_);
  forgets_ = false;
}

const std::vector<std::byte>& Tensor::image() {
  if (image_.empty()) image_ = poison(buffer_.size());
  return image_;
}

void Tensor::fill(const Values& values) {
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

void Tensor::fill_constant(double value) { fill(Values(static_cast<std::size_t>(numel()), value)); }

void Tensor::fill_ids(const Ids& ids) {
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

void Tensor::fill_floats(const std::vector<float>& values) {
  const auto* bytes = reinterpret_cast<const std::byte*>(values.data());
  buffer_.upload({bytes, values.size() * sizeof(float)});
  image_.clear();
  forgets_ = true;
}

void Tensor::fill_random(Random& random, double deviation) {
  const std::size_t drawn = std::min(static_cast<std::size_t>(numel()), kRandomPeriod);
  std::vector<std::byte> bytes(drawn * size_of(dtype()));
  for (std::size_t i = 0; i < drawn; ++i) {
    const float value = random.unit() * static_cast<float>(deviation);
    if (dtype() == DType::kFloat32) {
      std::memcpy(bytes.data() + i * sizeof value, &value, sizeof value);
    } else {
      const bfloat16 narrow(value);
      std::memcpy(bytes.data() + i * sizeof narrow, &narrow, sizeof narrow);
    }
  }
  if (drawn == 0) return;
  buffer_.upload(bytes);
  buffer_.repeat(bytes.size());
  image_.clear();
  forgets_ = true;
}

// Elements from dimension `first_dim` on; the payload's element 0 is at byte `start`.
Values Tensor::values_of(const std::vector<std::byte>& payload, std::size_t start,
                         std::span<const std::int64_t> shape, int first_dim) const {
  std::vector<std::int64_t> strides;
  for (int dim = first_dim; dim < view_.rank(); ++dim) strides.push_back(view_.stride(dim));
  return oracle::to_double(ConstTensorView(payload.data() + start, dtype(), shape,
                                           std::span<const std::int64_t>(strides)));
}

Values Tensor::values() const { return values_of(buffer_.download(), start_, view_.shape(), 0); }

Values Tensor::block(std::int64_t i) const {
  std::vector<std::byte> payload(static_cast<std::size_t>(view_.stride(0)) * size_of(dtype()));
  buffer_.read(payload.data(), start_ + static_cast<std::size_t>(i) * payload.size(),
               payload.size());
  return values_of(payload, 0, view_.shape().subspan(1), 1);
}

Tensor Tensor::to(const Target& target) const {
  if (!defined()) return {};
  const auto shape = view_.shape();
  std::vector<std::int64_t> strides;
  for (int dim = 0; dim < view_.rank(); ++dim) strides.push_back(view_.stride(dim));
  Tensor copy(target, dtype(), {shape.begin(), shape.end()}, strides, start_);
  copy.image_ = buffer_.download();
  copy.buffer_.upload(copy.image_);
  return copy;
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
  if (forgets_) return {};
  const bool same = buffer_.holds(image_.empty() ? poison(buffer_.size()) : image_);
  return same ? "" : "changed an input";
}

}  // namespace sonicmoe::rig
