// The GPUs of this machine.
#pragma once

#include <string>
#include <vector>

#include "sonicmoe/backend.hpp"

namespace sonicmoe::cuda {

/// Empty when a GPU is there that a family of kernels serves, else one line that says what is
/// missing.
std::string unavailable_reason();

/// "NVIDIA H100 80GB HBM3, 132 SMs, CUDA 13.0" of the first usable GPU.
std::string description();

/// Every usable GPU.
std::vector<DeviceInfo> devices();

/// Multiprocessors that scratch and grids are planned for, whatever the GPU has: both are functions
/// of the shape alone. An H100 and an H200 have as many.
inline constexpr int kPlannedProcessors = 132;

class Products;

/// The family of kernels that serves a GPU, by its ordinal. Throws Error where none does.
const Products& products_of(int device);

/// Ordinal of the calling thread's current device.
int current_device();

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
