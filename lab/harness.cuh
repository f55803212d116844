// Shared by the Hopper experiments: error checks, device buffers, random data, event timing over
// interleaved variants, tensor maps, and one JSON object per measured row.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

// One second at any clock this chip runs: a wait that long is a hang.
#define SONICMOE_WAIT_LIMIT 2000000000u
#include "cuda/hopper/tile/pipeline.cuh"

namespace experiment {

using bf16 = __nv_bfloat16;

inline uint32_t* g_wait_report = nullptr;

// Prints what failed (and which device-side wait ran out, if one did) and exits: an experiment has
// nobody to hand the error to.
inline void check(cudaError_t status, const char* expression, const char* file, int line) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s:%d: %s: %s\n", file, line, expression, cudaGetErrorString(status));
  if (g_wait_report != nullptr && g_wait_report[0] != 0) {
    static const char* const kRoles[] = {"loader", "math", "epilogue", "consumer"};
    static const char* const kSlots[] = {"full", "empty", "dump_full", "dump_empty"};
    const uint32_t* r = g_wait_report;
    std::fprintf(stderr, "wait did not end: %s on %s[%u], parity %u, block %u, thread %u\n",
                 kRoles[r[1] & 3], kSlots[r[2] & 3], r[3], r[4], r[5], r[6]);
  }
  std::exit(1);
}
#define CHECK_CUDA(expression) ::experiment::check((expression), #expression, __FILE__, __LINE__)

// Connects the wait report of this translation unit to host memory.
inline void install_wait_report() {
  CHECK_CUDA(cudaHostAlloc(&g_wait_report, 64, cudaHostAllocMapped));
  std::memset(g_wait_report, 0, 64);
  uint32_t* device = nullptr;
  CHECK_CUDA(cudaHostGetDevicePointer(&device, g_wait_report, 0));
  CHECK_CUDA(cudaMemcpyToSymbol(sonicmoe::tile::wait_report, &device, sizeof(device)));
}

template <typename T>
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(size_t count) : count_(count) {
    CHECK_CUDA(cudaMalloc(&data_, std::max<size_t>(count, 1) * sizeof(T)));
  }
  explicit DeviceBuffer(const std::vector<T>& host) : DeviceBuffer(host.size()) {
    CHECK_CUDA(cudaMemcpy(data_, host.data(), bytes(), cudaMemcpyHostToDevice));
  }
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }

  T* data() const { return data_; }
  size_t size() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }
  void fill_bytes(int value) { CHECK_CUDA(cudaMemset(data_, value, bytes())); }
  std::vector<T> to_host() const {
    std::vector<T> host(count_);
    CHECK_CUDA(cudaMemcpy(host.data(), data_, bytes(), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

// A counter-based generator: 32 well mixed bits of (seed, i).
__host__ __device__ inline uint32_t hash(uint32_t seed, uint64_t i) {
  uint64_t z = (i + 1) * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return static_cast<uint32_t>((z ^ (z >> 31)) >> 16);
}

enum class Fill { kNormal, kTernary };  // N(0, 1), or integers -1, 0, 1 (exact sums)

static __global__ void fill_kernel(bf16* out, size_t count, uint32_t seed, Fill fill, float scale) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    const uint32_t h = hash(seed, i);
    float v;
    if (fill == Fill::kTernary) {
      v = static_cast<float>(static_cast<int>(h % 3) - 1);
    } else {
      const float u = ((h & 0xffff) + 0.5f) / 65536.0f;
      const float w = (h >> 16) / 65536.0f;
      v = sqrtf(-2.0f * __logf(u)) * __cosf(6.2831853f * w);
    }
    out[i] = __float2bfloat16(scale * v);
  }
}

inline void fill_random(const DeviceBuffer<bf16>& buffer, uint32_t seed, Fill fill = Fill::kNormal,
                        float scale = 1) {
  fill_kernel<<<132 * 8, 256>>>(buffer.data(), buffer.size(), seed, fill, scale);
  CHECK_CUDA(cudaGetLastError());
}

// A random permutation of 0..count-1.
inline std::vector<int> permutation(int count, uint32_t seed) {
  std::vector<int> p(count);
  for (int i = 0; i < count; ++i) p[i] = i;
  for (int i = count - 1; i > 0; --i) std::swap(p[i], p[hash(seed, i) % (i + 1)]);
  return p;
}

// Tensor map of a row-major bf16 tensor, dimensions innermost first; rows packed. 128-byte swizzle,
// so box[0] <= 64. Out-of-range elements read as zero.
inline CUtensorMap make_tensor_map(const void* data, std::initializer_list<uint64_t> dims,
                                   std::initializer_list<uint32_t> box) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    CHECK_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                cudaEnableDefault, &found));
    return reinterpret_cast<Encode>(entry);
  }();
  uint64_t strides[4];
  uint64_t stride = sizeof(bf16);
  for (size_t i = 0; i + 1 < dims.size(); ++i) strides[i] = stride *= dims.begin()[i];
  const uint32_t element_strides[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, static_cast<uint32_t>(dims.size()),
             const_cast<void*>(data), dims.begin(), strides, box.begin(), element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    std::fprintf(stderr, "cuTensorMapEncodeTiled: error %d\n", static_cast<int>(result));
    std::exit(1);
  }
  return map;
}

struct Timing {
  double median = 0, p10 = 0, p90 = 0;  // milliseconds
};

inline Timing summarise(std::vector<float> ms) {
  std::sort(ms.begin(), ms.end());
  auto at = [&](double q) { return ms[static_cast<size_t>(q * (ms.size() - 1) + 0.5)]; };
  return {at(0.5), at(0.1), at(0.9)};
}

// Times each launch function with events, `rounds` times, all variants in turn in every round; the
// first `warmup` rounds are dropped. `between` runs untimed before each launch.
inline std::vector<Timing> time_interleaved(
    const std::vector<std::function<void()>>& launches, int rounds, int warmup = 2,
    const std::function<void()>& between = [] {}) {
  cudaEvent_t begin, end;
  CHECK_CUDA(cudaEventCreate(&begin));
  CHECK_CUDA(cudaEventCreate(&end));
  std::vector<std::vector<float>> ms(launches.size());
  for (int round = 0; round < rounds + warmup; ++round) {
    for (size_t v = 0; v < launches.size(); ++v) {
      between();
      CHECK_CUDA(cudaEventRecord(begin));
      launches[v]();
      CHECK_CUDA(cudaEventRecord(end));
      CHECK_CUDA(cudaGetLastError());
      CHECK_CUDA(cudaEventSynchronize(end));
      float t = 0;
      CHECK_CUDA(cudaEventElapsedTime(&t, begin, end));
      if (round >= warmup) ms[v].push_back(t);
    }
  }
  CHECK_CUDA(cudaEventDestroy(begin));
  CHECK_CUDA(cudaEventDestroy(end));
  std::vector<Timing> out;
  for (auto& v : ms) out.push_back(summarise(v));
  return out;
}

// One line of JSON on stdout, prefixed so that a log can be searched for rows.
class Row {
 public:
  Row(const char* experiment, const std::string& variant) {
    text_ =
        "{\"experiment\": \"" + std::string(experiment) + "\", \"variant\": \"" + variant + "\"";
  }
  Row& text(const char* key, const std::string& value) {
    text_ += ", \"" + std::string(key) + "\": \"" + value + "\"";
    return *this;
  }
  Row& number(const char* key, double value) {
    char buffer[64];
    std::snprintf(buffer, sizeof(buffer), "%.5g", value);
    text_ += ", \"" + std::string(key) + "\": " + buffer;
    return *this;
  }
  Row& timing(const Timing& t) {
    return number("ms", t.median).number("ms_p10", t.p10).number("ms_p90", t.p90);
  }
  void print() const {
    std::printf("ROW %s}\n", text_.c_str());
    std::fflush(stdout);
  }

 private:
  std::string text_;
};

// Reports a correctness check; returns `ok`. A failed check stops the program in finish().
inline int g_failures = 0;
inline bool expect(bool ok, const std::string& what) {
  std::printf("%s %s\n", ok ? "ok  " : "FAIL", what.c_str());
  std::fflush(stdout);
  if (!ok) ++g_failures;
  return ok;
}

inline int finish() {
  CHECK_CUDA(cudaDeviceSynchronize());
  if (g_failures != 0) std::printf("%d checks failed\n", g_failures);
  return g_failures == 0 ? 0 : 1;
}

// Clock cycles of each block, written by measure-aware kernels: the median over blocks.
inline double median_cycles(const DeviceBuffer<uint64_t>& cycles) {
  std::vector<uint64_t> host = cycles.to_host();
  std::sort(host.begin(), host.end());
  return static_cast<double>(host[host.size() / 2]);
}

inline std::string format(const char* pattern, auto... values) {
  char buffer[256];
  std::snprintf(buffer, sizeof(buffer), pattern, values...);
  return buffer;
}

}  // namespace experiment
