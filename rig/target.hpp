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
  /// Aligned to 64 at least; freed by release(). Errors: std::bad_alloc.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void release(void* data, std::size_t bytes) = 0;
  virtual void upload(void* device, const void* host, std::size_t bytes) = 0;
  virtual void download(void* host, const void* device, std::size_t bytes) = 0;
  /// Inside the device; the ranges do not overlap.
  virtual void copy(void* to, const void* from, std::size_t bytes) = 0;
  /// Returns when everything handed to the device has ended.
  virtual void synchronize() {}
  /// Whether the device holds the same bytes as the host.
  virtual bool equal(const void* device, const void* host, std::size_t bytes);
  /// Makes [data, data + bytes) an error to touch, or legal again, where a sanitizer can do that.
  virtual void forbid(void* data, std::size_t bytes);
  virtual void permit(void* data, std::size_t bytes);
  /// Leaves NaN patterns in the shared memory of every multiprocessor, where there are any.
  virtual void poison_shared();
};

/// The memory of a device of devices().
DeviceMemory& memory_of(Device device);

/// From now on host memory is refused (std::bad_alloc) where all of it together would pass `bytes`:
/// a system grants more than there is, and ends the process that uses it.
void limit_host_memory(std::size_t bytes);

struct Target {
  std::string backend;  ///< empty: the library's choice, or host memory for the oracle alone
  Device device;
  DeviceMemory* memory = nullptr;
  int num_threads = 0;         ///< of a call that names none
  bool shared_device = false;  ///< of every call

  /// Refers to this target's `backend`: the target outlives the context.
  Context context(int threads = 0) const {
    Context result;
    result.device = device;
    result.num_threads = threads > 0 ? threads : num_threads;
    result.backend = backend;
    result.shared_device = shared_device;
    return result;
  }
};

inline std::ostream& operator<<(std::ostream& out, const Target& target) {
  return out << target.backend;
}

/// Where a call with this context runs.
Target target_of(const Context& context);

/// Whether the context's backend is available and serves its device.
bool serves(const Context& context);

/// Host memory without a backend.
const Target& host_target();

/// Every available backend on the first device of each kind that it serves.
const std::vector<Target>& targets();

}  // namespace sonicmoe::rig
