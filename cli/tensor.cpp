#include "cli/tensor.hpp"

#include <algorithm>
#include <cstring>
#include <new>

namespace sonicmoe::cli {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kGuardBytes = 64;
constexpr int kGuardValue = 0xA5;
constexpr int kUnwritten = 0xFF;  // NaN in float32 and bfloat16, -1 in the integers

}  // namespace

void Tensor::Free::operator()(std::byte* memory) const {
  ::operator delete[](memory, std::align_val_t{kAlignment});
}

Tensor::Tensor(DType dtype, std::vector<std::int64_t> shape) {
  std::size_t bytes = size_of(dtype);
  for (const std::int64_t extent : shape) bytes *= static_cast<std::size_t>(extent);
  memory_.reset(static_cast<std::byte*>(
      ::operator new[](bytes + 2 * kGuardBytes, std::align_val_t{kAlignment})));
  std::memset(memory_.get(), kGuardValue, kGuardBytes);
  std::memset(memory_.get() + kGuardBytes, kUnwritten, bytes);
  std::memset(memory_.get() + kGuardBytes + bytes, kGuardValue, kGuardBytes);
  view_ = TensorView(memory_.get() + kGuardBytes, dtype, shape);
}

Tensor Tensor::stored_transposed(DType dtype, std::vector<std::int64_t> shape) {
  std::swap(shape[shape.size() - 1], shape[shape.size() - 2]);
  Tensor tensor(dtype, std::move(shape));
  const int rank = tensor.view_.rank();
  tensor.view_ = transposed(tensor.view_, rank - 2, rank - 1);
  tensor.transposed_ = true;
  return tensor;
}

void Tensor::fill_random(Random& random, double deviation) {
  for (std::size_t i = 0; i < count(); ++i) {
    set(i, random.unit() * static_cast<float>(deviation));
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
  std::vector<std::int64_t> shape(view_.shape().begin(), view_.shape().end());
  Tensor copy = transposed_ ? stored_transposed(DType::kFloat32, std::move(shape))
                            : Tensor(DType::kFloat32, std::move(shape));
  for (std::size_t i = 0; i < count(); ++i) copy.as<float>()[i] = at(i);
  return copy;
}

bool Tensor::guards_intact() const {
  if (!defined()) return true;
  const auto intact = [](const std::byte* guard) {
    return std::all_of(guard, guard + kGuardBytes,
                       [](std::byte b) { return b == std::byte{kGuardValue}; });
  };
  return intact(memory_.get()) && intact(memory_.get() + kGuardBytes + view_.nbytes());
}

}  // namespace sonicmoe::cli
