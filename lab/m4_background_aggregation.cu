// M4: what the aggregation costs when 2 or 3 epilogue warps (64 or 96 threads per SM) run it beside
// a weight-gradient product: its GB/s while the math runs, and how much longer the product takes.
// Decides whether the backward's aggregation can hide behind dW1 and dW2 (kernels A.7).
#include <memory>

#include "bmm_problem.cuh"

namespace {

using namespace experiment;

constexpr Major kMn = Major::kMn;

struct Aggregation {
  Aggregation(int tokens, int top_k, int d)
      : tokens(tokens),
        top_k(top_k),
        d(d),
        y(size_t(tokens) * top_k * d),
        o(size_t(tokens) * d),
        counter(1) {
    fill_random(y, 21);
    std::vector<int> pos(size_t(tokens) * top_k);
    std::vector<float> s(pos.size());
    for (size_t i = 0; i < pos.size(); ++i) {
      pos[i] = static_cast<int>(i);  // Y in token order, as `down` stores it
      s[i] = (hash(22, i) & 0xffff) / 65536.0f;
    }
    this->pos = DeviceBuffer<int>(pos);
    this->s = DeviceBuffer<float>(s);
  }
  BackgroundParams params(int units, bool complete) const {
    return {y.data(), pos.data(), s.data(), o.data(), counter.data(),
            tokens,   top_k,      d,        units,    complete};
  }
  int units_per_pass() const { return tokens * ((d + kUnitColumns - 1) / kUnitColumns); }
  double bytes_per_unit() const { return double(tokens) * d * 2 * (top_k + 1) / units_per_pass(); }
  bool correct() const {
    const std::vector<bf16> got = o.to_host(), values = y.to_host();
    const std::vector<float> weights = s.to_host();
    double error = 0, norm = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      const size_t t = i / d;
      double sum = 0;
      for (int k = 0; k < top_k; ++k) {
        sum += double{weights[t * top_k + k]} *
               double{__bfloat162float(values[(t * top_k + k) * d + i % d])};
      }
      const double g = __bfloat162float(got[i]);
      error += std::isfinite(g) ? (g - sum) * (g - sum) : INFINITY;
      norm += sum * sum;
    }
    return std::sqrt(error / norm) < 3e-3;
  }
  int tokens, top_k, d;
  DeviceBuffer<bf16> y, o;
  DeviceBuffer<int> pos, counter;
  DeviceBuffer<float> s;
};

// The aggregation alone, as its own kernel: the bandwidth it is compared with.
template <int kLoads>
__global__ void __launch_bounds__(256) aggregate_kernel(BackgroundParams p) {
  while (run_background_unit<kLoads>(p, threadIdx.x % 32)) {
  }
}

void check_background(const MainloopVariant& v, int top_k) {
  DeviceBuffer<uint64_t> cycles(132);
  Aggregation aggregation(500, top_k, 1536);
  aggregation.o.fill_bytes(0xff);
  aggregation.counter.fill_bytes(0);
  const BmmProblem problem({"small", 9, 512, 768, 256, 9}, Fill::kTernary);
  MainloopParams p = make_params(problem, v, cycles.data());
  p.background = aggregation.params(aggregation.units_per_pass(), true);
  launch(v, p);
  CHECK_CUDA(cudaDeviceSynchronize());
  expect(aggregation.correct(),
         format("m4 aggregation, %d warps, %d loads, %s", v.shape.background_warps,
                v.shape.background_loads, v.name.c_str()));
}

void measure(const BmmSize& size, const std::vector<MainloopVariant>& variants, int tokens,
             int top_k, int d, int rounds) {
  const BmmProblem problem(size, Fill::kNormal);
  const Aggregation aggregation(tokens, top_k, d);
  const int endless = 1 << 30;
  std::vector<DeviceBuffer<uint64_t>> cycles;
  for (size_t i = 0; i < variants.size(); ++i) cycles.emplace_back(132);
  std::vector<std::function<void()>> launches;
  std::vector<int> done(variants.size() + 1);
  for (size_t i = 0; i < variants.size(); ++i) {
    const MainloopVariant& v = variants[i];
    MainloopParams p = make_params(problem, v, cycles[i].data());
    p.background = aggregation.params(endless, false);
    launches.push_back([&v, p] { launch(v, p); });
  }
  const BackgroundParams alone = aggregation.params(aggregation.units_per_pass(), true);
  launches.push_back([&] {
    if (top_k % 16 == 0) {
      aggregate_kernel<16><<<132 * 3, 256>>>(alone);
    } else {
      aggregate_kernel<8><<<132 * 4, 256>>>(alone);
    }
  });
  const std::vector<Timing> timings = time_interleaved(
      launches, rounds, 2, [&] { CHECK_CUDA(cudaMemset(aggregation.counter.data(), 0, 4)); });
  for (size_t i = 0; i < variants.size(); ++i) {  // units handed out in one more run
    CHECK_CUDA(cudaMemset(aggregation.counter.data(), 0, 4));
    launches[i]();
    CHECK_CUDA(cudaDeviceSynchronize());
    done[i] = aggregation.counter.to_host()[0];
  }
  const std::string text = format("%s: E %d, M %d, N %d, K %d; T %d, top-K %d, d %d", size.name,
                                  size.experts, size.m, size.n, size.k, tokens, top_k, d);
  for (size_t i = 0; i < variants.size(); ++i) {
    const MainloopShape& shape = variants[i].shape;
    double base = 0;  // the same product without background work
    for (size_t j = 0; j < variants.size(); ++j) {
      MainloopShape plain = variants[j].shape;
      if (plain.background_warps == 0 && plain.cluster == shape.cluster &&
          plain.output == shape.output && plain.block_n == shape.block_n) {
        base = timings[j].median;
      }
    }
    Row("m4_background", format("%s, background %d warps x %d loads", variants[i].name.c_str(),
                                shape.background_warps, shape.background_loads))
        .text("size", text)
        .timing(timings[i])
        .number("tflops", size.flops() / timings[i].median * 1e-9)
        .number("background_gb_s",
                shape.background_warps == 0
                    ? 0
                    : done[i] * aggregation.bytes_per_unit() / timings[i].median * 1e-6)
        .number("slowdown", timings[i].median / base)
        .number("clk_per_k_tile", median_cycles(cycles[i]) / median_k_tiles(size, 256))
        .number("clock_mhz", median_cycles(cycles[i]) / timings[i].median * 1e-3)
        .number("needed_gb", aggregation.units_per_pass() * aggregation.bytes_per_unit() * 1e-9)
        .number("done_gb",
                shape.background_warps == 0 ? 0 : done[i] * aggregation.bytes_per_unit() * 1e-9)
        .print();
  }
  Row("m4_background", "aggregation alone")
      .text("size", text)
      .timing(timings.back())
      .number("background_gb_s", aggregation.units_per_pass() * aggregation.bytes_per_unit() /
                                     timings.back().median * 1e-6)
      .print();
}

}  // namespace

int main(int argc, char** argv) {
  install_wait_report();
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 11;
  constexpr Output kNone = Output::kNone, kStore = Output::kStore;
  const std::vector<MainloopVariant> eight = {
      mainloop_variant<MainloopShape{256, 3, 1, kMn, kMn, kNone, 0, 8}>(),
      mainloop_variant<MainloopShape{256, 3, 1, kMn, kMn, kNone, 2, 8}>(),
      mainloop_variant<MainloopShape{256, 3, 1, kMn, kMn, kNone, 3, 8}>(),
      mainloop_variant<MainloopShape{256, 3, 1, kMn, kMn, kStore, 0, 8}>(true),
      mainloop_variant<MainloopShape{256, 3, 1, kMn, kMn, kStore, 2, 8}>(true),
      mainloop_variant<MainloopShape{256, 3, 1, kMn, kMn, kStore, 3, 8}>(true),
      mainloop_variant<MainloopShape{256, 3, 1, kMn, kMn, Output::kBulkRows, 0, 8}>(),
      mainloop_variant<MainloopShape{256, 3, 1, kMn, kMn, Output::kBulkRows, 3, 8}>(),
      mainloop_variant<MainloopShape{256, 3, 2, kMn, kMn, kStore, 0, 8}>(true),
      mainloop_variant<MainloopShape{256, 3, 2, kMn, kMn, kStore, 3, 8}>(true),
  };
  std::vector<MainloopVariant> sixteen = eight;
  sixteen.push_back(mainloop_variant<MainloopShape{256, 3, 1, kMn, kMn, kStore, 2, 16}>(true));
  sixteen.push_back(mainloop_variant<MainloopShape{256, 3, 1, kMn, kMn, kStore, 3, 16}>(true));
  sixteen.push_back(mainloop_variant<MainloopShape{256, 3, 2, kMn, kMn, kStore, 3, 16}>(true));
  const std::vector<MainloopVariant> checked = sixteen;
  sixteen.push_back(mainloop_variant<MainloopShape{256, 3, 1, kMn, kMn, kStore, 3, 8,
                                                   BackgroundWork::kLoadsOnly}>(true));
  sixteen.push_back(
      mainloop_variant<MainloopShape{256, 3, 1, kMn, kMn, kStore, 3, 8, BackgroundWork::kMathOnly}>(
          true));
  DeviceBuffer<uint64_t> cycles(132);
  for (const MainloopVariant& v : checked) {
    if (v.shape.background_warps > 0) check_background(v, 16);
  }
  check_background(eight[2], 8);
  if (g_failures == 0) {
    // dW1 of 30B-n256 and 30B-n1024, and of 7B-n256; A is X's token blocks, shared by the experts.
    measure({"30B-n256 dW1", 256, 4096, 512, 2048, 16}, sixteen, 32768, 16, 4096, rounds);
    measure({"30B-n1024 dW1", 64, 4096, 2048, 2048, 16}, eight, 32768, 8, 4096, rounds);
    measure({"7B-n256 dW1", 128, 1536, 512, 1536, 16}, eight, 24576, 8, 1536, rounds);
  }
  return finish();
}
