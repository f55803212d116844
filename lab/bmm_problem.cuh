// Operands, reference and launch of the dense batched product in mainloop.cuh.
#pragma once

#include "mainloop.cuh"

namespace experiment {

struct BmmSize {
  const char* name;
  int experts, m, n, k;
  int a_experts;  // distinct A matrices (= experts, or fewer when experts share token blocks)
  double flops() const { return 2.0 * experts * m * n * k; }
};

// `samples` random outputs (all of them in order when samples is the output's size), as d has them
// and as fp64 sums.
static __global__ void reference_kernel(const bf16* a, const bf16* b, const bf16* d, BmmSize size,
                                        bool a_k_major, bool b_k_major, int64_t samples, bool all,
                                        uint32_t seed, float* got, double* want) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < samples;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t total = int64_t{size.experts} * size.m * size.n;
    const uint64_t wide = (uint64_t{hash(seed, i)} << 32) | hash(seed + 1, i);
    const int64_t at = all ? i : static_cast<int64_t>(wide % total);
    const int64_t e = at / (int64_t{size.m} * size.n), ea = e % size.a_experts;
    const int64_t r = at / size.n % size.m, c = at % size.n;
    double sum = 0;
    for (int64_t k = 0; k < size.k; ++k) {
      const bf16 x =
          a_k_major ? a[(ea * size.m + r) * size.k + k] : a[(ea * size.k + k) * size.m + r];
      const bf16 y =
          b_k_major ? b[(e * size.n + c) * size.k + k] : b[(e * size.k + k) * size.n + c];
      sum += double{__bfloat162float(x)} * double{__bfloat162float(y)};
    }
    got[i] = __bfloat162float(d[at]);
    want[i] = sum;
  }
}

struct BmmProblem {
  BmmProblem(const BmmSize& s, Fill fill)
      : size(s),
        a(size_t(s.a_experts) * s.m * s.k),
        b(size_t(s.experts) * s.n * s.k),
        d(size_t(s.experts) * s.m * s.n) {
    fill_random(a, 11, fill);
    fill_random(b, 12, fill);
  }
  BmmSize size;
  DeviceBuffer<bf16> a, b, d;  // the layout of a and b is the variant's choice
};

struct MainloopVariant {
  std::string name;
  MainloopShape shape;
  void (*kernel)(MainloopParams);
  int shared_bytes;
  bool skew;
};

template <MainloopShape kShape>
MainloopVariant mainloop_variant(bool skew = false) {
  using S = MainloopSpec<kShape>;
  CHECK_CUDA(cudaFuncSetAttribute(mainloop_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  S::shared_bytes));
  const char* outputs[] = {"mainloop", "dump", "store", "bulk rows", "tensor store"};
  auto letter = [](Major m) { return m == Major::kK ? "K" : "MN"; };
  std::string name = format("128x%d, %d stages, cluster %d, A %s, B %s, %s", kShape.block_n,
                            kShape.stages, kShape.cluster, letter(kShape.a), letter(kShape.b),
                            outputs[static_cast<int>(kShape.output)]);
  if (skew) name += ", skew";
  if (kShape.background_work == BackgroundWork::kLoadsOnly) name += ", loads only";
  if (kShape.background_work == BackgroundWork::kMathOnly) name += ", arithmetic only";
  return {name, kShape, mainloop_kernel<S>, S::shared_bytes, skew};
}

inline MainloopParams make_params(const BmmProblem& problem, const MainloopVariant& v,
                                  uint64_t* cycles) {
  const BmmSize& s = problem.size;
  const uint64_t m = s.m, n = s.n, k = s.k, ea = s.a_experts, e = s.experts;
  const uint32_t b_rows = v.shape.block_n / v.shape.cluster;
  MainloopParams p = {};
  p.a = v.shape.a == Major::kK ? make_tensor_map(problem.a.data(), {k, m, ea}, {64, 128, 1})
                               : make_tensor_map(problem.a.data(), {m, k, ea}, {64, 64, 1});
  p.b = v.shape.b == Major::kK ? make_tensor_map(problem.b.data(), {k, n, e}, {64, b_rows, 1})
                               : make_tensor_map(problem.b.data(), {n, k, e}, {64, 64, 1});
  p.d_map = make_tensor_map(problem.d.data(), {n, m, e}, {64, 64, 1});
  p.d = problem.d.data();
  p.cycles = cycles;
  p.experts = s.experts;
  p.a_experts = s.a_experts;
  p.m_tiles = s.m / 128;
  p.n_tiles = (s.n + v.shape.block_n - 1) / v.shape.block_n;
  p.k_tiles = s.k / 64;
  p.n = s.n;
  p.skew = v.skew;
  return p;
}

// k-tiles that the block with the median running time works through.
inline double median_k_tiles(const BmmSize& s, int block_n) {
  const int tiles = s.experts * (s.m / 128) * ((s.n + block_n - 1) / block_n);
  return double(tiles / 132 + (tiles % 132 > 66 ? 1 : 0)) * (s.k / 64);
}

// One CTA of 384 threads per multiprocessor.
template <class P>
void launch_clusters(void (*kernel)(P), int shared_bytes, int cluster, const P& p) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(132);
  config.blockDim = dim3(384);
  config.dynamicSmemBytes = shared_bytes;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  CHECK_CUDA(cudaLaunchKernelEx(&config, kernel, p));
}

inline void launch(const MainloopVariant& v, const MainloopParams& p) {
  launch_clusters(v.kernel, v.shared_bytes, v.shape.cluster, p);
}

// Poisons the output, runs `launch` once and compares `samples` outputs with fp64: bit for bit when
// the data is ternary and k <= 256, else within bf16's rounding. Prints the result.
inline bool check_against_fp64(const BmmProblem& problem, const std::string& name, Major a_major,
                               Major b_major, int64_t samples, bool exact,
                               const std::function<void()>& launch) {
  CHECK_CUDA(cudaMemset(problem.d.data(), 0xff, problem.d.bytes()));
  launch();
  CHECK_CUDA(cudaDeviceSynchronize());
  const bool all = samples == static_cast<int64_t>(problem.d.size());
  DeviceBuffer<float> got_buffer(samples);
  DeviceBuffer<double> want_buffer(samples);
  reference_kernel<<<132 * 8, 128>>>(problem.a.data(), problem.b.data(), problem.d.data(),
                                     problem.size, a_major == Major::kK, b_major == Major::kK,
                                     samples, all, 5, got_buffer.data(), want_buffer.data());
  CHECK_CUDA(cudaGetLastError());
  const std::vector<float> got = got_buffer.to_host();
  const std::vector<double> want = want_buffer.to_host();
  double error = 0, norm = 0, worst = 0;
  int64_t wrong = 0;
  for (int64_t i = 0; i < samples; ++i) {
    if (exact) wrong += !(got[i] == want[i]);
    const double difference = std::isfinite(got[i]) ? got[i] - want[i] : INFINITY;
    error += difference * difference;
    norm += want[i] * want[i];
    worst = std::max(worst, std::abs(difference));
  }
  const double relative = std::sqrt(error / norm);
  const bool ok = exact ? wrong == 0 : relative < 3e-3;
  return expect(ok, format("%s, %s: relative error %.2e, max %.3g, wrong %lld of %lld",
                           problem.size.name, name.c_str(), relative, worst,
                           static_cast<long long>(wrong), static_cast<long long>(samples)));
}

inline bool check_product(const BmmProblem& problem, const MainloopVariant& v, int64_t samples,
                          bool exact, uint64_t* cycles) {
  MainloopParams params = make_params(problem, v, cycles);
  params.store_direct = true;
  return check_against_fp64(problem, v.name, v.shape.a, v.shape.b, samples, exact,
                            [&] { launch(v, params); });
}

}  // namespace experiment
