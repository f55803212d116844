// Where memory lies and where an operation runs.
#pragma once

#include <cstdint>
#include <string>

#include "sonicmoe/export.hpp"

namespace sonicmoe {

/// Kinds of devices that memory lies on.
enum class DeviceType : std::uint8_t { kCpu, kCuda };

/// Where the memory of a tensor lies.
struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;  ///< ordinal of a CUDA device; 0 for the CPU

  friend bool operator==(const Device&, const Device&) = default;
};

/// "cpu" or "cuda:1", for messages.
SONICMOE_API std::string to_string(const Device& device);

}  // namespace sonicmoe
