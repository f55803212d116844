#include "cli/device_buffer.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "cli/resources.hpp"
#include "sonicmoe/backend.hpp"

#if defined(SONICMOE_HAS_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace sonicmoe::cli {
namespace {

constexpr std::align_val_t kAlignment{64};

#if defined(SONICMOE_HAS_CUDA)
void check(cudaError_t status) {
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();  // must not show up in the next launch
    throw std::bad_alloc();
  }
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
  }
}
void use(Device device) { check(cudaSetDevice(device.index)); }
void* cuda_allocate(Device device, std::size_t bytes) {
  use(device);
  void* data = nullptr;
  check(cudaMalloc(&data, bytes));
  return data;
}
void cuda_free(void* data) { (void)cudaFree(data); }
void cuda_copy(Device device, void* to, const void* from, std::size_t bytes) {
  use(device);
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
}
void cuda_fill(Device device, void* data, int value, std::size_t bytes) {
  use(device);
  check(cudaMemset(data, value, bytes));
}
void cuda_synchronize(Device device) {
  use(device);
  check(cudaDeviceSynchronize());
}
#else
// Never reached: without CUDA in the build, devices() has the CPU alone.
[[noreturn]] void no_cuda() { throw std::logic_error("this build has no CUDA"); }
void* cuda_allocate(Device, std::size_t) { no_cuda(); }
void cuda_free(void*) {}
void cuda_copy(Device, void*, const void*, std::size_t) { no_cuda(); }
void cuda_fill(Device, void*, int, std::size_t) { no_cuda(); }
void cuda_synchronize(Device) { no_cuda(); }
#endif

// Bytes of all buffers on the host. The system grants more than there is, and ends the process when
// it is written to.
std::atomic<std::size_t> host_bytes{0};

void* host_allocate(std::size_t bytes) {
  static const std::size_t memory = usable_host_memory();
  const std::size_t budget = memory == 0 ? SIZE_MAX : memory / 10 * 9;
  if (host_bytes.fetch_add(bytes) > budget - std::min(budget, bytes)) {
    host_bytes -= bytes;
    throw std::bad_alloc();
  }
  void* data = ::operator new(bytes, kAlignment, std::nothrow);
  if (data == nullptr) {
    host_bytes -= bytes;
    throw std::bad_alloc();
  }
  return data;
}
void host_free(void* data, std::size_t bytes) {
  ::operator delete(data, kAlignment);
  host_bytes -= bytes;
}

}  // namespace

DeviceBuffer::DeviceBuffer(Device device, std::size_t bytes) : device_(device), bytes_(bytes) {
  void* data = on_host(device) ? host_allocate(bytes) : cuda_allocate(device, bytes);
  data_ = static_cast<std::byte*>(data);
}

DeviceBuffer::~DeviceBuffer() {
  if (on_host(device_)) {
    host_free(data_, bytes_);
  } else {
    cuda_free(data_);
  }
}

void copy_bytes(Device to_device, void* to, Device from_device, const void* from,
                std::size_t bytes) {
  if (bytes == 0) return;
  if (on_host(to_device) && on_host(from_device)) {
    std::memcpy(to, from, bytes);
  } else {
    cuda_copy(on_host(to_device) ? from_device : to_device, to, from, bytes);
  }
}

void fill_bytes(Device device, void* data, int value, std::size_t bytes) {
  if (bytes == 0) return;
  if (on_host(device)) {
    std::memset(data, value, bytes);
  } else {
    cuda_fill(device, data, value, bytes);
  }
}

void synchronize(Device device) {
  if (!on_host(device)) cuda_synchronize(device);
}

std::size_t memory_bytes_of(Device device) {
  if (on_host(device)) return usable_host_memory();
  for (const DeviceInfo& info : devices()) {
    if (same_device(info.device, device)) return info.memory_bytes;
  }
  return 0;
}

}  // namespace sonicmoe::cli
