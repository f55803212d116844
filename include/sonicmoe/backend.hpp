// Which implementations exist, which one serves a device, and why another does not.
#pragma once

#include <string>
#include <vector>

#include "sonicmoe/context.hpp"
#include "sonicmoe/export.hpp"

namespace sonicmoe {

/// A backend of this library, built or not.
struct BackendInfo {
  std::string name;    ///< "cuda", "cpu" or "reference"
  bool available;      ///< can run something on this machine
  std::string reason;  ///< why it is off, or what it runs on ("oneDNN 2.6.3, AVX2, 2 threads")
};

/// All backends in order of preference; the reference is last. SONICMOE_BACKEND=name forces one,
/// SONICMOE_LOG=dispatch prints each choice and its reason to stderr.
SONICMOE_API std::vector<BackendInfo> backends();

/// A device that some backend serves.
struct DeviceInfo {
  Device device;
  std::string name;
  std::size_t memory_bytes;  ///< total memory of the device
};

/// The CPU first, then every usable CUDA device.
SONICMOE_API std::vector<DeviceInfo> devices();

}  // namespace sonicmoe
