// Energy and clock of a kernel that is launched again and again: what it costs at the card's power
// limit. NVML is loaded at run time.
#pragma once

#include <dlfcn.h>

#include <chrono>
#include <thread>

#include "harness.cuh"

namespace experiment {

class Nvml {
 public:
  Nvml() {
    void* library = dlopen("libnvidia-ml.so.1", RTLD_NOW);
    if (library == nullptr) {
      std::printf("no NVML: %s\n", dlerror());
      return;
    }
    auto initialise = reinterpret_cast<int (*)()>(dlsym(library, "nvmlInit_v2"));
    auto find = reinterpret_cast<int (*)(const char*, void**)>(
        dlsym(library, "nvmlDeviceGetHandleByPciBusId_v2"));
    energy_ = reinterpret_cast<Energy>(dlsym(library, "nvmlDeviceGetTotalEnergyConsumption"));
    clock_ = reinterpret_cast<Clock>(dlsym(library, "nvmlDeviceGetClockInfo"));
    char bus[32];
    CHECK_CUDA(cudaDeviceGetPCIBusId(bus, sizeof(bus), 0));
    available_ = initialise != nullptr && find != nullptr && energy_ != nullptr &&
                 clock_ != nullptr && initialise() == 0 && find(bus, &device_) == 0;
  }
  bool available() const { return available_; }
  // Since the driver was loaded; NaN where the card does not tell.
  double joules() const {
    unsigned long long millijoules = 0;
    return available_ && energy_(device_, &millijoules) == 0 ? 1e-3 * double(millijoules) : NAN;
  }
  // Of the multiprocessors, now.
  double megahertz() const {
    unsigned value = 0;
    constexpr int kMultiprocessors = 1;
    return available_ && clock_(device_, kMultiprocessors, &value) == 0 ? value : NAN;
  }

 private:
  using Energy = int (*)(void*, unsigned long long*);
  using Clock = int (*)(void*, int, unsigned*);
  bool available_ = false;
  void* device_ = nullptr;
  Energy energy_ = nullptr;
  Clock clock_ = nullptr;
};

struct Power {
  double ms = 0;  // of a launch
  double watts = 0, megahertz = 0;
};

// Launches without a pause for `settle` seconds and then for `seconds`, which are measured.
inline Power measure_power(const Nvml& nvml, const std::function<void()>& launch, double settle,
                           double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point t) {
    return std::chrono::duration<double>(Clock::now() - t).count();
  };
  // Batches of some milliseconds, one of them always queued behind the one that runs.
  const auto begin_one = Clock::now();
  launch();
  CHECK_CUDA(cudaDeviceSynchronize());
  const int batch = std::max(1, int(0.01 / since(begin_one)));
  cudaEvent_t done[2];
  for (cudaEvent_t& event : done) CHECK_CUDA(cudaEventCreate(&event));
  int64_t launches = 0;
  double clocks = 0;
  int readings = 0;
  const auto run_for = [&](double time) {
    launches = readings = 0;
    clocks = 0;
    const auto begin = Clock::now();
    for (int i = 0; i < 2 || since(begin) < time; ++i) {
      if (i >= 2) CHECK_CUDA(cudaEventSynchronize(done[i % 2]));
      for (int j = 0; j < batch; ++j) launch();
      CHECK_CUDA(cudaEventRecord(done[i % 2]));
      launches += batch;
      clocks += nvml.megahertz();
      ++readings;
    }
    CHECK_CUDA(cudaDeviceSynchronize());
    return since(begin);
  };
  run_for(settle);
  const double joules = nvml.joules(), time = run_for(seconds);
  for (cudaEvent_t& event : done) CHECK_CUDA(cudaEventDestroy(event));
  return {1e3 * time / double(launches), (nvml.joules() - joules) / time, clocks / readings};
}

}  // namespace experiment
