// The GPUs of this machine.
#pragma once

#include <string>
#include <vector>

#include "sonicmoe/backend.hpp"

namespace sonicmoe::cuda {

/// Empty when a GPU of compute capability 9.0 is there, else one line that says what is missing.
std::string unavailable_reason();

/// "NVIDIA H100 80GB HBM3, 132 SMs, CUDA 13.0" of the first usable GPU.
std::string description();

/// Every usable GPU.
std::vector<DeviceInfo> devices();

/// Makes a device current for a scope. Throws Error when there is no such device.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

}  // namespace sonicmoe::cuda
