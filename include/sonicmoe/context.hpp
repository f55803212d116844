// Where and how an operation runs.
#pragma once

#include <cstdint>
#include <string_view>

namespace sonicmoe {

enum class DeviceType : std::uint8_t { kCpu, kCuda };

struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;  // ordinal of a CUDA device; 0 for the CPU
};

/// An opaque stream: a cudaStream_t on CUDA, unused on the CPU. Null is the default stream.
struct Stream {
  void* handle = nullptr;
};

/// Passed to every operation. Operations are thread-safe: the library has no mutable global state
/// that a result depends on.
struct Context {
  Device device;
  Stream stream;
  /// CPU threads of one call; 0 takes OpenMP's default. Results do not depend on it, bit for bit.
  int num_threads = 0;
  /// Name of the backend to use ("cpu", "reference", "cuda"); empty: the first of backends() that
  /// serves the device. An unknown or unavailable name is an Error.
  std::string_view backend;
};

}  // namespace sonicmoe
