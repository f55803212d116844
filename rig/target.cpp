#include "rig/target.hpp"

#include <cstring>
#include <new>
#include <stdexcept>

#include "core/backend.hpp"

#if defined(SONICMOE_HAS_CUDA)
#include <cuda_runtime_api.h>

#include "rig/poison_shared.hpp"
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace sonicmoe::rig {
namespace {

class HostMemory final : public DeviceMemory {
 public:
  void* allocate(std::size_t bytes, std::size_t alignment) override {
    const std::size_t padded = (bytes + alignment - 1) / alignment * alignment;
    void* data = std::aligned_alloc(alignment, padded);
    if (data == nullptr) throw std::bad_alloc();
    return data;
  }
  void release(void* data) override { std::free(data); }
  void upload(void* device, const void* host, std::size_t bytes) override {
    std::memcpy(device, host, bytes);
  }
  void download(void* host, const void* device, std::size_t bytes) override {
    std::memcpy(host, device, bytes);
  }
  bool equal(const void* device, const void* host, std::size_t bytes) override {
    return std::memcmp(device, host, bytes) == 0;
  }
#if defined(__SANITIZE_ADDRESS__)
  void forbid(void* data, std::size_t bytes) override { ASAN_POISON_MEMORY_REGION(data, bytes); }
  void permit(void* data, std::size_t bytes) override { ASAN_UNPOISON_MEMORY_REGION(data, bytes); }
#endif
};

#if defined(SONICMOE_HAS_CUDA)
class CudaMemory final : public DeviceMemory {
 public:
  void* allocate(std::size_t bytes, std::size_t) override {  // cudaMalloc aligns to 256
    void* data = nullptr;
    check(cudaMalloc(&data, bytes == 0 ? 1 : bytes));
    return data;
  }
  void release(void* data) override { (void)cudaFree(data); }
  void upload(void* device, const void* host, std::size_t bytes) override {
    check(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice));
  }
  void download(void* host, const void* device, std::size_t bytes) override {
    check(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost));
  }
  void poison_shared() override { check(launch_poison_shared()); }

 private:
  static void check(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
  }
};
#endif

HostMemory& host_memory() {
  static HostMemory memory;
  return memory;
}

std::vector<Target> find_targets() {
  std::vector<Target> result;
  for (const auto& backend : backend_list()) {
    if (!backend->unavailable_reason().empty()) continue;
    if (backend->serves(DeviceType::kCpu)) {
      result.push_back({std::string(backend->name()), Device{}, &host_memory()});
    }
#if defined(SONICMOE_HAS_CUDA)
    if (backend->serves(DeviceType::kCuda)) {
      static CudaMemory memory;
      result.push_back({std::string(backend->name()), Device{DeviceType::kCuda, 0}, &memory});
    }
#endif
  }
  return result;
}

}  // namespace

bool DeviceMemory::equal(const void* device, const void* host, std::size_t bytes) {
  std::vector<std::byte> copy(bytes);
  download(copy.data(), device, bytes);
  return std::memcmp(copy.data(), host, bytes) == 0;
}
void DeviceMemory::forbid(void*, std::size_t) {}
void DeviceMemory::permit(void*, std::size_t) {}
void DeviceMemory::poison_shared() {}

const Target& host_target() {
  static const Target target{"", Device{}, &host_memory()};
  return target;
}

const std::vector<Target>& targets() {
  static const std::vector<Target> list = find_targets();
  return list;
}

}  // namespace sonicmoe::rig
