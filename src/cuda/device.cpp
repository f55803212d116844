#include "cuda/device.hpp"

#include <cuda_runtime_api.h>

#include "cuda/launch_check.hpp"

namespace sonicmoe::cuda {
namespace {

struct Gpus {
  std::string reason;  // empty: at least one is usable
  std::vector<int> ordinals;
};

bool is_hopper(int ordinal) {
  int major = 0, minor = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal) ==
             cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal) ==
             cudaSuccess &&
         major == 9 && minor == 0;
}

Gpus find() {
  Gpus gpus;
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    gpus.reason = std::string("no usable driver or GPU: ") + cudaGetErrorString(status);
    (void)cudaGetLastError();  // an absent GPU must not show up in a later launch check
    return gpus;
  }
  for (int i = 0; i < count; ++i) {
    if (is_hopper(i)) gpus.ordinals.push_back(i);
  }
  if (gpus.ordinals.empty()) {
    gpus.reason = "none of the " + std::to_string(count) +
                  " GPUs has compute capability 9.0 (H100, H200), which the kernels are built for";
  }
  return gpus;
}

const Gpus& gpus() {
  static const Gpus found = find();
  return found;
}

cudaDeviceProp properties(int ordinal) {
  cudaDeviceProp p{};
  check_cuda(cudaGetDeviceProperties(&p, ordinal), "cuda");
  return p;
}

}  // namespace

std::string unavailable_reason() { return gpus().reason; }

std::string description() {
  if (gpus().ordinals.empty()) return "no GPU";
  const cudaDeviceProp p = properties(gpus().ordinals.front());
  int version = 0;
  (void)cudaRuntimeGetVersion(&version);
  return std::string(p.name) + ", " + std::to_string(p.multiProcessorCount) + " SMs, CUDA " +
         std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::vector<DeviceInfo> devices() {
  std::vector<DeviceInfo> list;
  for (const int i : gpus().ordinals) {
    const cudaDeviceProp p = properties(i);
    list.push_back({Device{DeviceType::kCuda, i}, p.name, p.totalGlobalMem});
  }
  return list;
}

DeviceGuard::DeviceGuard(int device) {
  // In a thread that has not used CUDA yet, cudaSetDevice makes the context current, without which
  // the driver's own calls (tensor maps) fail. cudaGetDevice does not.
  thread_local int entered = -1;
  cudaError_t status = cudaGetDevice(&previous_);
  if (status == cudaSuccess && (previous_ != device || entered != device)) {
    status = cudaSetDevice(device);
    entered = device;
  }
  check_cuda(status, "cuda:" + std::to_string(device));
}

DeviceGuard::~DeviceGuard() { (void)cudaSetDevice(previous_); }

}  // namespace sonicmoe::cuda
