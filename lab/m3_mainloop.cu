// M3: the mainloop alone (TMA operands, no gather, no store), with a dump, and as a whole GEMM with
// epilogue warps: tile widths, ring depths, pairs that share B, and the three operand layouts of
// the six GEMMs, in turn with cuBLAS's strided batched product. Settles the tile table (kernels
// A.6).
#include "cublas.cuh"

namespace {

using namespace experiment;

constexpr Major kK = Major::kK, kMn = Major::kMn;
constexpr Output kNone = Output::kNone, kDump = Output::kDump, kStore = Output::kStore;
constexpr Output kBulkRows = Output::kBulkRows, kTensorStore = Output::kTensorStore;

void check_all(const std::vector<MainloopVariant>& variants) {
  DeviceBuffer<uint64_t> cycles(132);
  // More tiles than CTAs, so that stages and dump halves are reused; then k counts around the
  // stages.
  const BmmProblem exact({"exact", 9, 512, 1536, 256, 9}, Fill::kTernary);
  const BmmProblem one_k({"one k-tile", 5, 256, 768, 64, 2}, Fill::kTernary);
  const BmmProblem real({"real", 3, 1024, 768, 1088, 3}, Fill::kNormal);
  for (const MainloopVariant& v : variants) {
    if (v.shape.output == kDump) continue;  // its product never leaves shared memory
    check_product(exact, v, exact.d.size(), true, cycles.data());
    check_product(one_k, v, one_k.d.size(), true, cycles.data());
    check_product(real, v, 1 << 17, false, cycles.data());
  }
}

void time_all(const BmmProblem& problem, const std::vector<MainloopVariant>& variants, int rounds,
              const Cublas& cublas) {
  std::vector<DeviceBuffer<uint64_t>> cycles;
  for (size_t i = 0; i < variants.size(); ++i) cycles.emplace_back(132);
  std::vector<std::function<void()>> launches;
  for (size_t i = 0; i < variants.size(); ++i) {
    const MainloopVariant& v = variants[i];
    const MainloopParams p = make_params(problem, v, cycles[i].data());
    launches.push_back([&v, p] { launch(v, p); });
  }
  const std::pair<Major, Major> layouts[] = {{kK, kK}, {kK, kMn}, {kMn, kMn}};
  for (const auto& [a, b] : layouts) {
    if (cublas.available()) launches.push_back([&, a, b] { cublas.multiply(problem, a, b); });
  }
  const std::vector<Timing> timings = time_interleaved(launches, rounds);
  const BmmSize& s = problem.size;
  for (size_t i = variants.size(); i < launches.size(); ++i) {
    const auto& [a, b] = layouts[i - variants.size()];
    Row("m3_mainloop", format("cuBLAS, A %s, B %s", a == kK ? "K" : "MN", b == kK ? "K" : "MN"))
        .text("size", format("%s: E %d, M %d, N %d, K %d", s.name, s.experts, s.m, s.n, s.k))
        .timing(timings[i])
        .number("tflops", s.flops() / timings[i].median * 1e-9)
        .print();
  }
  for (size_t i = 0; i < variants.size(); ++i) {
    const int block_n = variants[i].shape.block_n;
    const double clocks = median_cycles(cycles[i]);
    // A tile keeps the tensor cores busy for block_n * 4 clocks per k-tile at best.
    const double k_tiles = median_k_tiles(s, block_n);
    Row("m3_mainloop", variants[i].name)
        .text("size", format("%s: E %d, M %d, N %d, K %d", s.name, s.experts, s.m, s.n, s.k))
        .timing(timings[i])
        .number("tflops", s.flops() / timings[i].median * 1e-9)
        .number("clk_per_k_tile", clocks / k_tiles)
        .number("tensor_busy", block_n * 4 * k_tiles / clocks)
        .number("clock_mhz", clocks / timings[i].median * 1e-3)
        .print();
  }
}

}  // namespace

int main(int argc, char** argv) {
  install_wait_report();
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 15;
  const std::vector<MainloopVariant> all = {
      mainloop_variant<MainloopShape{256, 3, 1, kK, kK, kNone}>(),
      mainloop_variant<MainloopShape{256, 4, 1, kK, kK, kNone}>(),
      mainloop_variant<MainloopShape{256, 3, 2, kK, kK, kNone}>(),
      mainloop_variant<MainloopShape{256, 4, 2, kK, kK, kNone}>(),
      mainloop_variant<MainloopShape{256, 3, 1, kK, kMn, kNone}>(),
      mainloop_variant<MainloopShape{256, 3, 2, kK, kMn, kNone}>(),
      mainloop_variant<MainloopShape{256, 3, 1, kMn, kMn, kNone}>(),
      mainloop_variant<MainloopShape{256, 4, 1, kMn, kMn, kNone}>(),
      mainloop_variant<MainloopShape{256, 3, 2, kMn, kMn, kNone}>(),
      mainloop_variant<MainloopShape{192, 4, 1, kK, kK, kNone}>(),
      mainloop_variant<MainloopShape{192, 4, 2, kK, kK, kNone}>(),
      mainloop_variant<MainloopShape{128, 5, 1, kK, kK, kNone}>(),
      mainloop_variant<MainloopShape{128, 5, 2, kK, kK, kNone}>(),
      mainloop_variant<MainloopShape{256, 3, 1, kK, kK, kDump}>(),
      mainloop_variant<MainloopShape{256, 3, 1, kK, kK, kDump}>(true),
      mainloop_variant<MainloopShape{256, 3, 2, kK, kK, kDump}>(true),
      mainloop_variant<MainloopShape{256, 3, 1, kK, kK, kStore}>(),
      mainloop_variant<MainloopShape{256, 3, 1, kK, kK, kStore}>(true),
      mainloop_variant<MainloopShape{256, 3, 2, kK, kK, kStore}>(),
      mainloop_variant<MainloopShape{256, 3, 2, kK, kK, kStore}>(true),
      mainloop_variant<MainloopShape{256, 3, 1, kK, kMn, kStore}>(true),
      mainloop_variant<MainloopShape{256, 3, 2, kK, kMn, kStore}>(true),
      mainloop_variant<MainloopShape{256, 3, 1, kMn, kMn, kStore}>(true),
      mainloop_variant<MainloopShape{256, 3, 2, kMn, kMn, kStore}>(true),
      mainloop_variant<MainloopShape{256, 3, 1, kK, kK, kBulkRows}>(),
      mainloop_variant<MainloopShape{256, 3, 1, kK, kK, kBulkRows}>(true),
      mainloop_variant<MainloopShape{256, 3, 2, kK, kK, kBulkRows}>(),
      mainloop_variant<MainloopShape{256, 3, 1, kK, kK, kTensorStore}>(),
      mainloop_variant<MainloopShape{256, 3, 2, kK, kK, kTensorStore}>(),
      mainloop_variant<MainloopShape{192, 4, 1, kK, kK, kStore}>(true),
      mainloop_variant<MainloopShape{192, 4, 2, kK, kK, kStore}>(true),
      mainloop_variant<MainloopShape{128, 5, 1, kK, kK, kStore}>(true),
      mainloop_variant<MainloopShape{128, 5, 2, kK, kK, kStore}>(true),
  };
  const Cublas cublas;
  check_all(all);
  if (g_failures == 0) {
    // The up-projection of 30B-n1024, its reverse, a width that 192 divides, and the small d of 7B.
    time_all(BmmProblem({"30B-n1024 up", 64, 2048, 2048, 4096, 64}, Fill::kNormal), all, rounds,
             cublas);
    time_all(BmmProblem({"N 3072", 64, 2048, 3072, 2048, 64}, Fill::kNormal), all, rounds, cublas);
    time_all(BmmProblem({"7B-n256 up", 128, 1536, 512, 1536, 128}, Fill::kNormal), all, rounds,
             cublas);
    time_all(BmmProblem({"30B-n256 down", 256, 2048, 4096, 256, 256}, Fill::kNormal), all, rounds,
             cublas);
  }
  return finish();
}
