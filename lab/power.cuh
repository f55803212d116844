// Energy and clock of a kernel that is launched again and again: what it costs at the card's power
// limit. NVML is loaded at run time.
#pragma once

#include <dlfcn.h>

#include <chrono>
#include <cmath>

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

// Launches without a pause for `settle` seconds and then for `seconds`, which are measured. The
// card's energy counter advances in steps of up to a tenth of a second: it is read where it steps.
inline Power measure_power(const Nvml& nvml, const std::function<void()>& launch, double settle,
                           double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point t) {
    return std::chrono::duration<double>(Clock::now() - t).count();
  };
  const auto timed_launch = [&] {
    const auto begin = Clock::now();
    launch();
    CHECK_CUDA(cudaDeviceSynchronize());
    return since(begin);
  };
  timed_launch();  // and what it sets up
  // Batches of some milliseconds, one of them always queued behind the one that runs.
  const int batch = std::max(1, int(0.01 / timed_launch()));
  cudaEvent_t done[2];
  for (cudaEvent_t& event : done) CHECK_CUDA(cudaEventCreate(&event));
  int64_t batches = 0, measured = 0;
  double clocks = 0, first_joules = 0, first_time = 0, last_joules = 0, last_time = 0;
  const auto begin = Clock::now();
  double joules = nvml.joules();
  while (since(begin) < settle + seconds) {
    if (batches >= 2) CHECK_CUDA(cudaEventSynchronize(done[batches % 2]));
    for (int j = 0; j < batch; ++j) launch();
    CHECK_CUDA(cudaEventRecord(done[batches++ % 2]));
    const double now = since(begin), reading = nvml.joules();
    const bool stepped = reading != joules;
    joules = reading;
    if (now < settle) continue;
    clocks += nvml.megahertz();
    ++measured;
    if (!stepped) continue;
    if (first_time == 0) {
      first_joules = reading;
      first_time = now;
    }
    last_joules = reading;
    last_time = now;
  }
  // Time per launch from events of the last batches: the same load, still settled.
  cudaEvent_t ends[2];
  for (cudaEvent_t& event : ends) CHECK_CUDA(cudaEventCreate(&event));
  constexpr int kTimedBatches = 20;
  CHECK_CUDA(cudaEventRecord(ends[0]));
  for (int j = 0; j < kTimedBatches * batch; ++j) launch();
  CHECK_CUDA(cudaEventRecord(ends[1]));
  CHECK_CUDA(cudaDeviceSynchronize());
  float ms = 0;
  CHECK_CUDA(cudaEventElapsedTime(&ms, ends[0], ends[1]));
  for (cudaEvent_t& event : done) CHECK_CUDA(cudaEventDestroy(event));
  for (cudaEvent_t& event : ends) CHECK_CUDA(cudaEventDestroy(event));
  return {double(ms) / (kTimedBatches * batch),
          (last_joules - first_joules) / (last_time - first_time), clocks / double(measured)};
}

inline constexpr double kFlopsPerClock = 132.0 * 4096;  // dense bf16, of all multiprocessors

// The row of a product of `flops`.
inline void print_power(const char* experiment, const std::string& product, const char* shape,
                        const Power& power, double flops) {
  const double rate = flops / power.ms * 1e3;
  if (!expect(std::isfinite(power.watts),
              format("%s %s: energy is counted", experiment, product.c_str())))
    return;
  Row(experiment, product)
      .text("shape", shape)
      .number("ms", power.ms)
      .number("tflops", rate * 1e-12)
      .number("watts", power.watts)
      .number("mhz", power.megahertz)
      .number("tensor_busy", rate / (kFlopsPerClock * power.megahertz * 1e6))
      .number("pj_per_flop", power.watts / rate * 1e12)
      .print();
}

}  // namespace experiment
