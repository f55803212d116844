#include "rig/target.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <stdexcept>

#include "sonicmoe/backend.hpp"
#include "sonicmoe/error.hpp"
#include "sonicmoe/router.hpp"

#if defined(SONICMOE_HAS_CUDA)
#include <cuda_runtime_api.h>

#include "rig/poison_shared.hpp"
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace sonicmoe::rig {
namespace {

std::atomic<std::size_t> most_host_bytes{SIZE_MAX};

class HostMemory final : public DeviceMemory {
 public:
  void* allocate(std::size_t bytes) override {
    const std::size_t most = most_host_bytes;
    const bool granted = taken_.fetch_add(bytes) <= most - std::min(most, bytes);
    void* data = granted ? std::aligned_alloc(kAlignment, padded(bytes)) : nullptr;
    if (data == nullptr) {
      taken_ -= bytes;
      throw std::bad_alloc();
    }
    return data;
  }
  void release(void* data, std::size_t bytes) override {
    std::free(data);
    taken_ -= bytes;
  }
  void upload(void* device, const void* host, std::size_t bytes) override {
    std::memcpy(device, host, bytes);
  }
  void download(void* host, const void* device, std::size_t bytes) override {
    std::memcpy(host, device, bytes);
  }
  void copy(void* to, const void* from, std::size_t bytes) override {
    std::memcpy(to, from, bytes);
  }
  bool equal(const void* device, const void* host, std::size_t bytes) override {
    return std::memcmp(device, host, bytes) == 0;
  }
#if defined(__SANITIZE_ADDRESS__)
  void forbid(void* data, std::size_t bytes) override { ASAN_POISON_MEMORY_REGION(data, bytes); }
  void permit(void* data, std::size_t bytes) override { ASAN_UNPOISON_MEMORY_REGION(data, bytes); }
#endif

 private:
  static constexpr std::size_t kAlignment = 64;
  static std::size_t padded(std::size_t bytes) {
    return std::max<std::size_t>(1, (bytes + kAlignment - 1) / kAlignment) * kAlignment;
  }

  std::atomic<std::size_t> taken_{0};
};

#if defined(SONICMOE_HAS_CUDA)
class CudaMemory final : public DeviceMemory {
 public:
  explicit CudaMemory(int index) : index_(index) {}

  void* allocate(std::size_t bytes) override {  // cudaMalloc aligns to 256
    void* data = nullptr;
    use();
    check(cudaMalloc(&data, std::max<std::size_t>(bytes, 1)));
    return data;
  }
  void release(void* data, std::size_t) override { (void)cudaFree(data); }
  void upload(void* device, const void* host, std::size_t bytes) override {
    use();
    check(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice));
  }
  void download(void* host, const void* device, std::size_t bytes) override {
    use();
    check(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost));
  }
  void copy(void* to, const void* from, std::size_t bytes) override {
    use();
    check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToDevice));
  }
  void synchronize() override {
    use();
    check(cudaDeviceSynchronize());
  }
  void poison_shared() override {
    use();
    check(launch_poison_shared());
  }

 private:
  void use() const { check(cudaSetDevice(index_)); }
  static void check(cudaError_t status) {
    if (status == cudaErrorMemoryAllocation) {
      (void)cudaGetLastError();  // must not show up in the next launch
      throw std::bad_alloc();
    }
    if (status != cudaSuccess) {
      throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
    }
  }

  int index_;
};
#endif

std::vector<Target> find_targets() {
  std::vector<Target> result;
  for (const BackendInfo& backend : backends()) {
    for (const DeviceInfo& info : devices()) {
      Context context;
      context.backend = backend.name;
      context.device = info.device;
      if (info.device.index == 0 && serves(context)) result.push_back(target_of(context));
    }
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

DeviceMemory& memory_of(Device device) {
  static HostMemory host;
#if defined(SONICMOE_HAS_CUDA)
  static std::map<int, CudaMemory> cards;
  if (device.type == DeviceType::kCuda) {
    return cards.try_emplace(device.index, device.index).first->second;
  }
#endif
  if (device.type != DeviceType::kCpu) throw std::logic_error("this build has no CUDA");
  return host;
}

void limit_host_memory(std::size_t bytes) { most_host_bytes = bytes; }

Target target_of(const Context& context) {
  return {std::string(context.backend), context.device, &memory_of(context.device),
          context.num_threads};
}

bool serves(const Context& context) {
  try {
    round_tokens_workspace_bytes(context, 1, 1, 1);  // any operation: it chooses a backend
  } catch (const Error&) {
    return false;
  }
  return true;
}

const Target& host_target() {
  static const Target target = target_of(Context{});
  return target;
}

const std::vector<Target>& targets() {
  static const std::vector<Target> list = find_targets();
  return list;
}

}  // namespace sonicmoe::rig
