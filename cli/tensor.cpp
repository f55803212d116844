#include "cli/tensor.hpp"

#include <algorithm>
#include <array>
#include <utility>

namespace sonicmoe::cli {
namespace {

constexpr std::size_t kGuardBytes = 64;
constexpr int kGuardValue = 0xA5;
constexpr int kUnwritten = 0xFF;                 // NaN in float32 and bfloat16, -1 in the integers
constexpr std::size_t kRandomPeriod = 16777213;  // the largest prime below 2^24

}  // namespace

Tensor::Tensor(DType dtype, std::vector<std::int64_t> shape, Device device) {
  std::size_t bytes = size_of(dtype);
  for (const std::int64_t extent : shape) bytes *= static_cast<std::size_t>(extent);
  buffer_ = std::make_shared<DeviceBuffer>(device, bytes + 2 * kGuardBytes);
  std::byte* data = buffer_->data() + kGuardBytes;
  fill_bytes(device, buffer_->data(), kGuardValue, kGuardBytes);
  fill_bytes(device, data, kUnwritten, bytes);
  fill_bytes(device, data + bytes, kGuardValue, kGuardBytes);
  view_ = TensorView(data, dtype, shape, device);
}

Tensor Tensor::stored_transposed(DType dtype, std::vector<std::int64_t> shape, Device device) {
  std::swap(shape[shape.size() - 1], shape[shape.size() - 2]);
  Tensor tensor(dtype, std::move(shape), device);
  const int rank = tensor.view_.rank();
  tensor.view_ = transposed(tensor.view_, rank - 2, rank - 1);
  tensor.transposed_ = true;
  return tensor;
}

Tensor Tensor::to(Device device) const {
  if (!defined() || same_device(device, this->device())) return *this;
  Tensor copy =
      transposed_ ? stored_transposed(dtype(), shape(), device) : Tensor(dtype(), shape(), device);
  copy_bytes(device, copy.buffer_->data(), this->device(), buffer_->data(),
             view_.nbytes() + 2 * kGuardBytes);
  return copy;
}

Tensor Tensor::block(std::int64_t i) const {
  const auto extents = view_.shape().subspan(1);
  Tensor copy(dtype(), {extents.begin(), extents.end()});
  const std::size_t bytes = copy.view_.nbytes();
  copy_bytes(Device{}, copy.view_.data(), device(),
             as<std::byte>() + static_cast<std::size_t>(i) * bytes, bytes);
  return copy;
}

void Tensor::copy_from(const Tensor& from) {
  if (from.dtype() == dtype()) {
    copy_bytes(device(), view_.data(), from.device(), from.view_.data(), view_.nbytes());
    return;
  }
  const Tensor source = from.to_host();
  for (std::size_t i = 0; i < count(); ++i) set(i, source.at(i));
}

void Tensor::fill_random(Random& random, double deviation) {
  const std::size_t drawn = std::min(count(), kRandomPeriod);
  Tensor values = on_host(device()) ? *this : Tensor(dtype(), {static_cast<std::int64_t>(drawn)});
  for (std::size_t i = 0; i < drawn; ++i) {
    values.set(i, random.unit() * static_cast<float>(deviation));
  }
  auto* data = as<std::byte>();
  const std::size_t total = view_.nbytes();
  std::size_t done = drawn * size_of(dtype());
  if (!on_host(device())) copy_bytes(device(), data, Device{}, values.as<std::byte>(), done);
  while (done < total) {  // what is there, again: a whole number of periods until the last copy
    const std::size_t bytes = std::min(done, total - done);
    copy_bytes(device(), data + done, device(), data, bytes);
    done += bytes;
  }
}

void Tensor::fill(float value) {
  for (std::size_t i = 0; i < count(); ++i) set(i, value);
}

float Tensor::at(std::size_t i) const {
  switch (dtype()) {
    case DType::kFloat32:
      return as<float>()[i];
    case DType::kBFloat16:
      return as<bfloat16>()[i];
    case DType::kInt32:
      return static_cast<float>(as<std::int32_t>()[i]);
    case DType::kInt64:
      return static_cast<float>(as<std::int64_t>()[i]);
    case DType::kUInt8:
      return static_cast<float>(as<std::uint8_t>()[i]);
    case DType::kFloat16:
    case DType::kFloat64:
    case DType::kInt8:
    case DType::kInt16:
    case DType::kBool:
      break;  // no operation takes these
  }
  return 0.0f;
}

void Tensor::set(std::size_t i, float value) {
  if (dtype() == DType::kBFloat16) {
    as<bfloat16>()[i] = bfloat16(value);
  } else {
    as<float>()[i] = value;
  }
}

Tensor Tensor::to_float32() const {
  if (!defined()) return {};
  Tensor copy =
      transposed_ ? stored_transposed(DType::kFloat32, shape()) : Tensor(DType::kFloat32, shape());
  for (std::size_t i = 0; i < count(); ++i) copy.as<float>()[i] = at(i);
  return copy;
}

bool Tensor::guards_intact() const {
  if (!defined()) return true;
  const auto intact = [&](const std::byte* guard) {
    std::array<std::byte, kGuardBytes> bytes;
    copy_bytes(Device{}, bytes.data(), device(), guard, kGuardBytes);
    return std::all_of(bytes.begin(), bytes.end(),
                       [](std::byte b) { return b == std::byte{kGuardValue}; });
  };
  return intact(buffer_->data()) && intact(buffer_->data() + kGuardBytes + view_.nbytes());
}

}  // namespace sonicmoe::cli
