// M1: how fast L2 takes vector reductions. Rows of 512 bytes in random order, eight adds per row,
// into windows that fit L2 or do not: red.v4.bf16x2, red.v4.f32, bulk bf16 reductions out of shared
// memory, and plain stores as the ceiling. Decides whether a combine by reduction can replace Y
// (kernels A.7).
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/memory.cuh"
#include "harness.cuh"
#include "ptx_extra.cuh"

namespace {

using namespace experiment;
namespace ptx = sonicmoe::ptx;

constexpr int kRowBytes = 512;
constexpr int kHits = 8;

enum class Method { kStore, kRedBf16, kRedF32, kBulkBf16 };

// Value of element i of a row: small integers, so that eight adds are exact in bf16.
__host__ __device__ float element(int i) { return static_cast<float>(1 + (i & 3)); }

// window [rows, 512 B], order [count]: row of the i-th operation. One warp per operation.
template <Method kMethod>
__global__ void __launch_bounds__(1024) reduce_rows(uint8_t* window, const int* order, int count) {
  __shared__ alignas(128) bf16 source[kRowBytes / 2];
  const int lane = threadIdx.x % 32;
  const int warps = gridDim.x * blockDim.x / 32;
  const int first = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  uint4 packed;
  packed.x = packed.z = 0x40003f80u;  // 1, 2
  packed.y = packed.w = 0x40804040u;  // 3, 4
  const float4 values = {element(0), element(1), element(2), element(3)};
  if constexpr (kMethod == Method::kBulkBf16) {
    for (int i = threadIdx.x; i < kRowBytes / 2; i += blockDim.x) {
      source[i] = __float2bfloat16(element(i));
    }
    ptx::fence_proxy_async_shared();
    __syncthreads();
  }
  // 32 rows per load of the order, so that no operation waits for its own row number.
  for (int i = first * 32; i < count; i += warps * 32) {
    const int mine = i + lane < count ? __ldg(order + i + lane) : -1;
    if constexpr (kMethod == Method::kBulkBf16) {
      if (mine >= 0) {
        ptx_extra::bulk_reduce_add_bf16(window + int64_t{mine} * kRowBytes,
                                        ptx::shared_address(source), kRowBytes);
      }
      ptx_extra::bulk_commit_group();
    } else {
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        const int64_t row = __shfl_sync(~0u, mine, j);
        if (row < 0) break;
        uint8_t* address = window + row * kRowBytes + lane * 16;
        if constexpr (kMethod == Method::kStore) ptx::store_global_v4(address, packed);
        if constexpr (kMethod == Method::kRedBf16) ptx::reduce_add_bf16x2_v4(address, packed);
        if constexpr (kMethod == Method::kRedF32) ptx_extra::reduce_add_f32_v4(address, values);
      }
    }
  }
  if constexpr (kMethod == Method::kBulkBf16) ptx_extra::bulk_wait_all();
}

struct Variant {
  const char* name;
  void (*kernel)(uint8_t*, const int*, int);
  int threads;  // per SM
  Method method;
};

bool correct(const Variant& v, DeviceBuffer<uint8_t>& window, const DeviceBuffer<int>& order) {
  window.fill_bytes(v.method == Method::kStore ? 0xff : 0);
  const int threads = std::min(v.threads, 1024);
  v.kernel<<<132 * (v.threads / threads), threads>>>(window.data(), order.data(),
                                                     static_cast<int>(order.size()));
  CHECK_CUDA(cudaGetLastError());
  const std::vector<uint8_t> host = window.to_host();
  const float times = v.method == Method::kStore ? 1 : kHits;
  size_t wrong = 0;
  if (v.method == Method::kRedF32) {
    const float* f = reinterpret_cast<const float*>(host.data());
    for (size_t i = 0; i < host.size() / 4; ++i) wrong += f[i] != times * element(i);
  } else {
    const uint16_t* b = reinterpret_cast<const uint16_t*>(host.data());
    for (size_t i = 0; i < host.size() / 2; ++i) {
      const uint32_t bits = uint32_t{b[i]} << 16;
      float f;
      std::memcpy(&f, &bits, 4);
      wrong += f != times * element(i);
    }
  }
  return wrong == 0;
}

}  // namespace

int main() {
  const std::vector<Variant> variants = {
      {"store.v4, 2048 threads/SM", reduce_rows<Method::kStore>, 2048, Method::kStore},
      {"red.v4.bf16x2, 2048 threads/SM", reduce_rows<Method::kRedBf16>, 2048, Method::kRedBf16},
      {"red.v4.f32, 2048 threads/SM", reduce_rows<Method::kRedF32>, 2048, Method::kRedF32},
      {"bulk red bf16 512 B, 2048 threads/SM", reduce_rows<Method::kBulkBf16>, 2048,
       Method::kBulkBf16},
      {"store.v4, 96 threads/SM", reduce_rows<Method::kStore>, 96, Method::kStore},
      {"red.v4.bf16x2, 96 threads/SM", reduce_rows<Method::kRedBf16>, 96, Method::kRedBf16},
      {"red.v4.f32, 96 threads/SM", reduce_rows<Method::kRedF32>, 96, Method::kRedF32},
      {"bulk red bf16 512 B, 96 threads/SM", reduce_rows<Method::kBulkBf16>, 96, Method::kBulkBf16},
  };
  for (const int megabytes : {12, 25, 34, 50, 256}) {
    const int rows = megabytes * 1000 * 1000 / kRowBytes;
    std::vector<int> order;
    for (int hit = 0; hit < kHits; ++hit) {
      const std::vector<int> p = permutation(rows, 17 + hit);
      order.insert(order.end(), p.begin(), p.end());
    }
    DeviceBuffer<uint8_t> window(size_t{static_cast<size_t>(rows)} * kRowBytes);
    DeviceBuffer<int> device_order(order);
    std::vector<std::function<void()>> launches;
    for (const Variant& v : variants) {
      if (megabytes == 25) expect(correct(v, window, device_order), std::string("m1 ") + v.name);
      const int threads = std::min(v.threads, 1024);
      launches.push_back([&v, &window, &device_order, threads] {
        v.kernel<<<132 * (v.threads / threads), threads>>>(window.data(), device_order.data(),
                                                           static_cast<int>(device_order.size()));
      });
    }
    const std::vector<Timing> timings = time_interleaved(launches, 15);
    const double bytes = double(order.size()) * kRowBytes;
    for (size_t i = 0; i < variants.size(); ++i) {
      Row("m1_red_rate", variants[i].name)
          .number("window_mb", megabytes)
          .timing(timings[i])
          .number("payload_tb_s", bytes / timings[i].median * 1e-9)
          .print();
    }
  }
  return finish();
}
