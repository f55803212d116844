#include "kept_memory.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <list>
#include <mutex>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace sonicmoe_torch {
namespace {

constexpr std::size_t kAlignment = 64;

// The freed buffers, the one freed last in front.
class FreeList {
 public:
  // Never destroyed: tensors may be freed after static objects are.
  static FreeList& instance() {
    static auto* list = new FreeList;
    return *list;
  }

  // A kept buffer of `bytes` to 5/4 `bytes`, else a new one. The caller gives back what `capacity`
  // is set to.
  void* take(std::size_t bytes, std::size_t& capacity) {
    {
      const std::lock_guard lock(mutex_);
      for (auto it = buffers_.begin(); it != buffers_.end(); ++it) {
        if (it->capacity < bytes || it->capacity > bytes + bytes / 4) continue;
        void* const data = it->data;
        capacity = it->capacity;
        kept_ -= capacity;
        buffers_.erase(it);
        return data;
      }
    }
    capacity = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    void* const data = std::aligned_alloc(kAlignment, capacity);
    if (data == nullptr) {
      throw std::runtime_error("out of memory. sonicmoe_cpp could not allocate " +
                               std::to_string(bytes) + " bytes");
    }
    return data;
  }

  void give_back(void* data, std::size_t capacity) {
    const std::lock_guard lock(mutex_);
    buffers_.push_front({data, capacity});
    kept_ += capacity;
    while (kept_ > kMostKeptResults) {
      kept_ -= buffers_.back().capacity;
      std::free(buffers_.back().data);
      buffers_.pop_back();
    }
  }

 private:
  struct Buffer {
    void* data;
    std::size_t capacity;
  };
  std::mutex mutex_;
  std::list<Buffer> buffers_;
  std::size_t kept_ = 0;
};

void give_back(void* data, void* capacity) {
  FreeList::instance().give_back(data, reinterpret_cast<std::size_t>(capacity));
}

using FromBlob = AOTITorchError (*)(void*, std::int64_t, const std::int64_t*, const std::int64_t*,
                                    std::int64_t, std::int32_t, std::int32_t, std::int32_t,
                                    AtenTensorHandle*, std::int32_t, const std::uint8_t*,
                                    std::int64_t, void (*)(void*, void*), void*);

// Of torch 2.11 and later; this library's headers are held to 2.10.
FromBlob from_blob() {
  static const auto function = reinterpret_cast<FromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
  return function;
}

std::size_t bytes_per_element(ScalarType dtype) { return dtype == ScalarType::Float ? 4 : 2; }

// A CPU tensor over kept memory.
Tensor over_kept(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides,
                 ScalarType dtype, std::size_t bytes) {
  std::size_t capacity = 0;
  void* const data = FreeList::instance().take(bytes, capacity);
  AtenTensorHandle handle = nullptr;
  const auto type = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(dtype));
  const AOTITorchError error =
      from_blob()(data, static_cast<std::int64_t>(shape.size()), shape.data(), strides.data(), 0,
                  type, aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(),
                  nullptr, 0, give_back, reinterpret_cast<void*>(capacity));
  if (error != AOTI_TORCH_SUCCESS) {
    FreeList::instance().give_back(data, capacity);
    STABLE_TORCH_ERROR_CODE_CHECK(error);
  }
  return Tensor(handle);
}

std::size_t bytes_of(std::span<const std::int64_t> shape, ScalarType dtype) {
  const std::int64_t elements =
      std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
  return static_cast<std::size_t>(elements) * bytes_per_element(dtype);
}

// Some order of the dimensions is contiguous.
bool is_dense(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides) {
  std::vector<std::size_t> order(shape.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return strides[a] < strides[b]; });
  std::int64_t step = 1;
  for (const std::size_t i : order) {
    if (shape[i] <= 1) continue;
    if (strides[i] != step) return false;
    step *= shape[i];
  }
  return true;
}

// float32 and bfloat16 alone are ever large.
bool keeps(const Tensor& like, ScalarType dtype, std::size_t bytes) {
  return !like.is_cuda() && bytes >= kLeastKeptResult && from_blob() != nullptr &&
         (dtype == ScalarType::Float || dtype == ScalarType::BFloat16);
}

Tensor new_row_major(const Tensor& like, std::span<const std::int64_t> sizes, ScalarType dtype) {
  const std::size_t bytes = bytes_of(sizes, dtype);
  if (!keeps(like, dtype, bytes)) return new_tensor(like, sizes, dtype);
  std::vector<std::int64_t> strides(sizes.size(), 1);
  for (std::size_t i = sizes.size() - 1; i-- > 0;) strides[i] = strides[i + 1] * sizes[i + 1];
  return over_kept(sizes, strides, dtype, bytes);
}

// What the library asks of the gradient of a weight [E, a, b] or [E, d].
bool has_unit_stride(const Tensor& tensor) {
  const auto rank = tensor.dim();
  return tensor.stride(rank - 1) == 1 || (rank == 3 && tensor.stride(1) == 1);
}

}  // namespace

Tensor new_kept(const Tensor& like, std::initializer_list<std::int64_t> shape, ScalarType dtype) {
  return new_row_major(like, {shape.begin(), shape.size()}, dtype);
}

Tensor new_kept_like(const Tensor& like) {
  const auto sizes = like.sizes(), strides = like.strides();
  const std::span<const std::int64_t> shape(sizes.data(), sizes.size());
  const std::size_t bytes = bytes_of(shape, like.scalar_type());
  // Strides with gaps or overlaps are torch's to replace.
  if (!is_dense(shape, {strides.data(), strides.size()}) ||
      !keeps(like, like.scalar_type(), bytes)) {
    const Tensor tensor = new_like(like);
    // Of elements that overlap torch keeps an order of dimensions that no gradient may have.
    return has_unit_stride(tensor) ? tensor : new_row_major(like, shape, like.scalar_type());
  }
  return over_kept(shape, {strides.data(), strides.size()}, like.scalar_type(), bytes);
}

}  // namespace sonicmoe_torch
