// How an operation runs.
#pragma once

#include <string_view>

#include "sonicmoe/device.hpp"

namespace sonicmoe {

/// An opaque stream: a cudaStream_t on CUDA, unused on the CPU. Null is the default stream.
struct Stream {
  void* handle = nullptr;
};

/// Passed to every operation. Operations are thread-safe: the library has no mutable global state
/// that a result depends on.
struct Context {
  /// Every tensor of the call has to lie there.
  Device device;
  Stream stream;
  /// CPU threads of one call; 0 takes OpenMP's default. Results do not depend on it, bit for bit.
  int num_threads = 0;
  /// Other kernels run on the device at the same time, for example NCCL's beside a backward under
  /// FSDP. The CUDA backend then hands out every tile to whichever multiprocessor is free, where
  /// fixed shares would wait for the occupied ones: products take 1.0 to 1.2 times as long as alone
  /// in place of 1.4 to 1.9 (lab M19). Alone it costs up to 7%. Results do not depend on it.
  bool shared_device = false;
  /// Name of the backend to use ("cpu", "reference", "cuda"); empty: the first of backends() that
  /// serves the device. An unknown or unavailable name is an Error.
  std::string_view backend;
};

}  // namespace sonicmoe
