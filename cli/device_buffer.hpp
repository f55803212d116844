// Memory on a device, copies between devices, and waiting: all that the command asks of CUDA.
#pragma once

#include <cstddef>

#include "sonicmoe/context.hpp"

namespace sonicmoe::cli {

/// Uninitialised bytes on a device, aligned to at least 64, freed with the object.
class DeviceBuffer {
 public:
  /// Errors: std::bad_alloc where the device has not enough memory left, or where all buffers on
  /// the host together would pass 90% of what the process may use.
  DeviceBuffer(Device device, std::size_t bytes);
  ~DeviceBuffer();
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  Device device() const noexcept { return device_; }
  std::byte* data() const noexcept { return data_; }

 private:
  Device device_;
  std::size_t bytes_;
  std::byte* data_ = nullptr;
};

inline bool on_host(Device device) noexcept { return device.type == DeviceType::kCpu; }
inline bool same_device(Device a, Device b) noexcept {
  return a.type == b.type && (on_host(a) || a.index == b.index);
}

/// Copies in the order of the default stream; a copy to or from the host has ended on return.
void copy_bytes(Device to_device, void* to, Device from_device, const void* from,
                std::size_t bytes);
/// Sets every byte to `value`.
void fill_bytes(Device device, void* data, int value, std::size_t bytes);
/// Returns when everything handed to the device has ended. Nothing to do for the CPU.
void synchronize(Device device);
/// Memory of a device of devices() that this process may use, 0 where it is not known.
std::size_t memory_bytes_of(Device device);

}  // namespace sonicmoe::cli
