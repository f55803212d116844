#include "cuda/device.hpp"

#include <cuda_runtime_api.h>

#include <array>

#include "cuda/hopper/products.hpp"
#include "cuda/launch_check.hpp"
#include "cuda/products.hpp"

namespace sonicmoe::cuda {
namespace {

// Every family of kernels; a GPU gets the first that serves it.
const std::array kFamilies = {&hopper::products()};

struct Gpus {
  std::string reason;  // empty: at least one is usable
  std::vector<int> ordinals;
  std::vector<const Products*> families;  // of every GPU by ordinal, null: none serves it
};

const Products* family_of(int ordinal) {
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal) != cudaSuccess) {
    return nullptr;
  }
  for (const Products* family : kFamilies) {
    if (family->serves(major, minor)) return family;
  }
  return nullptr;
}

std::string release(int version) {  // 13000: "13.0"
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// What the user has to change, in one line.
std::string reason_for(cudaError_t status) {
  int driver = 0, runtime = 0;
  (void)cudaDriverGetVersion(&driver);
  (void)cudaRuntimeGetVersion(&runtime);
  if (driver == 0) return "no NVIDIA driver is installed";
  if (status == cudaErrorInsufficientDriver) {
    return "the NVIDIA driver serves CUDA " + release(driver) + ", these kernels need CUDA " +
           release(runtime) + ": update the driver";
  }
  return std::string("no usable GPU: ") + cudaGetErrorString(status);
}

Gpus find() {
  Gpus gpus;
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    gpus.reason = reason_for(status);
    (void)cudaGetLastError();  // an absent GPU must not show up in a later launch check
    return gpus;
  }
  for (int i = 0; i < count; ++i) {
    gpus.families.push_back(family_of(i));
    if (gpus.families.back() != nullptr) gpus.ordinals.push_back(i);
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

const Products& products_of(int device) {
  const auto index = static_cast<std::size_t>(device);
  const Products* family = index < gpus().families.size() ? gpus().families[index] : nullptr;
  if (family == nullptr) {
    throw Error("cuda:" + std::to_string(device) + ": no kernels of this build serve this device");
  }
  return *family;
}

int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return device;
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
