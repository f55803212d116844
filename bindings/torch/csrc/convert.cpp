#include "convert.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace sonicmoe_torch {
namespace {

std::atomic<bool> shared_device = false;

/// torch's current stream of a CUDA device. The function lives in libtorch_cuda, which a CPU build
/// of torch lacks and which is no dependency of this library: it is looked up where torch has
/// already loaded it. Running on another stream would be a silent race, so a miss is an error.
void* current_cuda_stream(std::int32_t device_index) {
  using Function = AOTITorchError (*)(std::int32_t, void**);
  static const Function get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol =
        library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Function>(symbol);
  }();
  if (get == nullptr) {
    throw sonicmoe::Error(
        "sonicmoe_cpp: this torch tells no current CUDA stream "
        "(aoti_torch_get_current_cuda_stream is not in libtorch_cuda.so)");
  }
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(device_index, &stream));
  return stream;
}

sonicmoe::Device device_of(const Tensor& tensor) {
  if (!tensor.is_cuda()) return {};
  return {sonicmoe::DeviceType::kCuda, tensor.get_device_index()};
}

/// Types that no argument takes pass through, so that the error names those that this one takes.
sonicmoe::DType dtype_of(const char* operation, const char* argument, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return sonicmoe::DType::kFloat32;
    case ScalarType::BFloat16:
      return sonicmoe::DType::kBFloat16;
    case ScalarType::Int:
      return sonicmoe::DType::kInt32;
    case ScalarType::Long:
      return sonicmoe::DType::kInt64;
    case ScalarType::Byte:
      return sonicmoe::DType::kUInt8;
    case ScalarType::Half:
      return sonicmoe::DType::kFloat16;
    case ScalarType::Double:
      return sonicmoe::DType::kFloat64;
    case ScalarType::Char:
      return sonicmoe::DType::kInt8;
    case ScalarType::Short:
      return sonicmoe::DType::kInt16;
    case ScalarType::Bool:
      return sonicmoe::DType::kBool;
    default:
      throw sonicmoe::Error(operation, argument, "real numbers of a common type",
                            torch::headeronly::toString(type));
  }
}

using IntArrayRef = torch::headeronly::IntHeaderOnlyArrayRef;

std::span<const std::int64_t> span_of(IntArrayRef values) { return {values.data(), values.size()}; }

template <class View, class Data>
View view(const char* operation, const char* argument, const Tensor& tensor, sonicmoe::DType dtype,
          Data* data) {
  const auto shape = span_of(tensor.sizes());
  if (shape.empty() || shape.size() > sonicmoe::kMaxRank) {
    throw sonicmoe::Error(operation, argument,
                          "1 to " + std::to_string(sonicmoe::kMaxRank) + " dimensions",
                          std::to_string(shape.size()));
  }
  // Torch leaves any strides on a tensor without elements.
  if (tensor.numel() == 0) return {data, dtype, shape, device_of(tensor)};
  return {data, dtype, shape, span_of(tensor.strides()), device_of(tensor)};
}

/// [..., d] as [rows, d], for a tensor of at least one dimension.
template <class View, class Data>
View rows_view(const char* operation, const char* argument, const Tensor& tensor,
               sonicmoe::DType dtype, Data* data) {
  const auto shape = span_of(tensor.sizes());
  const auto strides = span_of(tensor.strides());
  const std::size_t last = shape.size() - 1;
  std::array<std::int64_t, 2> matrix{1, shape[last]};
  std::array<std::int64_t, 2> steps{std::max<std::int64_t>(shape[last], 1), strides[last]};
  if (tensor.numel() == 0) steps[1] = 1;  // torch leaves any strides on a tensor without elements
  bool first = true;
  for (std::size_t i = last; i-- > 0; matrix[0] *= shape[i]) {
    if (shape[i] == 1 || tensor.numel() == 0) continue;
    if (first) {
      steps[0] = strides[i];
    } else if (strides[i] != steps[0] * matrix[0]) {
      throw sonicmoe::Error(operation, argument, "leading dimensions that are one in memory",
                            "others");
    }
    first = false;
  }
  return {data, dtype, matrix, steps, device_of(tensor)};
}

/// Why torch's last call through the stable interface failed; empty before torch 2.13, which tells
/// it on stderr alone.
std::string torch_reason() {
  using GetWhat = const char* (*)();
  static const auto get_what =
      reinterpret_cast<GetWhat>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  return get_what == nullptr ? "" : get_what();
}

/// What `allocate` returns. A failure is taken for a lack of memory unless torch says otherwise;
/// callers who want to shrink a batch look for these words.
template <class Allocate>
Tensor or_out_of_memory(const Tensor& like, IntArrayRef shape, ScalarType dtype,
                        Allocate allocate) {
  try {
    return allocate();
  } catch (const std::runtime_error&) {
    const std::string reason = torch_reason();
    const auto says = [&](const char* words) { return reason.find(words) != std::string::npos; };
    if (!reason.empty() && !says("out of memory") && !says("allocate memory")) {
      throw std::runtime_error(reason);
    }
    std::string message = like.is_cuda() ? "CUDA out of memory." : "out of memory.";
    message += " sonicmoe_cpp could not allocate [";
    auto bytes = static_cast<double>(sonicmoe::size_of(dtype_of("new_empty", "dtype", dtype)));
    for (std::size_t i = 0; i < shape.size(); ++i) {
      message += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
      bytes *= static_cast<double>(shape[i]);
    }
    message += std::string("] ") + torch::headeronly::toString(dtype) + ", " +
               std::to_string(bytes / 0x1p30) + " GiB. ";
    message += reason.empty() ? "torch has written its own report to stderr." : reason;
    throw std::runtime_error(message);
  }
}

Tensor new_empty(const Tensor& like, IntArrayRef shape, ScalarType dtype) {
  return or_out_of_memory(like, shape, dtype,
                          [&] { return torch::stable::new_empty(like, shape, dtype); });
}

}  // namespace

sonicmoe::ConstTensorView Views::in(const char* argument, const Tensor& tensor) const {
  const auto dtype = dtype_of(operation_, argument, tensor.scalar_type());
  return view<sonicmoe::ConstTensorView>(operation_, argument, tensor, dtype,
                                         tensor.const_data_ptr());
}

sonicmoe::ConstTensorView Views::in(const char* argument, const OptionalTensor& tensor) const {
  return tensor ? in(argument, *tensor) : sonicmoe::ConstTensorView();
}

sonicmoe::TensorView Views::out(const char* argument, const Tensor& tensor) const {
  const auto dtype = dtype_of(operation_, argument, tensor.scalar_type());
  return view<sonicmoe::TensorView>(operation_, argument, tensor, dtype, tensor.mutable_data_ptr());
}

sonicmoe::ConstTensorView Views::rows(const char* argument, const Tensor& tensor) const {
  if (tensor.dim() == 2 || tensor.dim() == 0) return in(argument, tensor);
  const auto dtype = dtype_of(operation_, argument, tensor.scalar_type());
  return rows_view<sonicmoe::ConstTensorView>(operation_, argument, tensor, dtype,
                                              tensor.const_data_ptr());
}

sonicmoe::ConstTensorView Views::rows(const char* argument, const OptionalTensor& tensor) const {
  return tensor ? rows(argument, *tensor) : sonicmoe::ConstTensorView();
}

sonicmoe::TensorView Views::out_rows(const char* argument, const Tensor& tensor) const {
  if (tensor.dim() == 2) return out(argument, tensor);
  const auto dtype = dtype_of(operation_, argument, tensor.scalar_type());
  return rows_view<sonicmoe::TensorView>(operation_, argument, tensor, dtype,
                                         tensor.mutable_data_ptr());
}

void set_shared_device(bool shared) { shared_device = shared; }

bool is_shared_device() { return shared_device; }

Call::Call(const Tensor& tensor) {
  context_.num_threads = static_cast<int>(torch::stable::get_num_threads());
  if (!tensor.is_cuda()) return;
  const auto index = tensor.get_device_index();
  guard_.emplace(index);
  context_.device = device_of(tensor);
  context_.shared_device = is_shared_device();
  context_.stream.handle = current_cuda_stream(index);
}

Tensor new_tensor(const Tensor& like, std::span<const std::int64_t> shape, ScalarType dtype) {
  return new_empty(like, IntArrayRef(shape.data(), shape.size()), dtype);
}

Tensor new_tensor(const Tensor& like, std::initializer_list<std::int64_t> shape, ScalarType dtype) {
  return new_tensor(like, std::span<const std::int64_t>(shape.begin(), shape.size()), dtype);
}

Tensor new_like_contiguous(const Tensor& like, ScalarType dtype) {
  return new_empty(like, like.sizes(), dtype);
}

Tensor new_rows(const Tensor& like, std::int64_t columns, ScalarType dtype) {
  const auto shape = span_of(like.sizes());
  std::vector<std::int64_t> rows(shape.begin(), shape.end());
  rows.back() = columns;
  return new_tensor(like, rows, dtype);
}

Tensor new_like(const Tensor& like) {
  return or_out_of_memory(like, like.sizes(), like.scalar_type(),
                          [&] { return torch::stable::empty_like(like); });
}

Tensor new_bytes(const Tensor& like, std::size_t bytes) {
  return new_tensor(like, {static_cast<std::int64_t>(bytes)}, ScalarType::Byte);
}

Tensor new_workspace(const Tensor& like, std::size_t bytes, bool limited) {
  if (like.is_cuda()) return new_bytes(like, bytes);  // torch keeps freed device memory itself
  thread_local std::optional<Tensor> kept;
  if (limited) kept.reset();
  if (limited || bytes > kMostKept) return new_bytes(like, bytes);
  if (!kept || static_cast<std::size_t>(kept->numel()) < bytes) {
    kept.reset();  // before its successor exists
    kept = new_bytes(like, bytes);
  }
  return *kept;
}

Tensor nothing(const Tensor& like) { return new_tensor(like, {0}, like.scalar_type()); }

}  // namespace sonicmoe_torch
