// Where a test case runs: a backend, a device and the device's memory. Cases are written once
// against this; a new backend that serves a device joins by appearing in targets().
#pragma once

#include <cstddef>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "sonicmoe/context.hpp"

namespace sonicmoe::rig {

/// Memory a backend's tensors lie in. The host sees it only through copies.
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;
  /// At least `alignment`-aligned; freed by release().
  virtual void* allocate(std::size_t bytes, std::size_t alignment) = 0;
  virtual void release(void* data) = 0;
  virtual void upload(void* device, const void* host, std::size_t bytes) = 0;
  virtual void download(void* host, const void* device, std::size_t bytes) = 0;
  /// Whether the device holds the same bytes as the host.
  virtual bool equal(const void* device, const void* host, std::size_t bytes);
  /// Makes [data, data + bytes) an error to touch, or legal again, where a sanitizer can do that.
  virtual void forbid(void* data, std::size_t bytes);
  virtual void permit(void* data, std::size_t bytes);
  /// Leaves NaN patterns in the shared memory of every multiprocessor, where there are any.
  virtual void poison_shared();
};

struct Target {
  std::string backend;  ///< empty: no backend, host memory for the oracle
  Device device;
  DeviceMemory* memory = nullptr;

  /// Refers to this target's `backend`: the target outlives the context.
  Context context(int num_threads = 0) const {
    Context result;
    result.device = device;
    result.num_threads = num_threads;
    result.backend = backend;
    return result;
  }
};

inline std::ostream& operator<<(std::ostream& out, const Target& target) {
  return out << target.backend;
}

/// Host memory without a backend.
const Target& host_target();

/// Every available backend on every device it serves.
const std::vector<Target>& targets();

}  // namespace sonicmoe::rig
