// M13: pingpong against cooperative math warpgroups, for the products without a gather (down and
// dX~ of the layer) as dense batched products of equal experts. M3 found that the dump costs 11% at
// a reduction of 256 and that two cooperating warpgroups do not hide it from each other; official
// sonic-moe's tuner picks pingpong here.
// `m13_pingpong`: checks, times, and the power of a few variants at 7B-n256.
// `m13_pingpong power [case]`: the power of all variants under lasting load.
//
// Expected on an H200 at its power limit (some 1.3 GHz, M3), ms of down / dX~:
//                            1.4B-n256    7B-n256      30B-n256     30B-n1024
//   cooperative 128x256      0.240/0.440  0.285/0.530  2.00/3.75    1.72/3.35
//   pingpong 128x192         0.215/0.405  0.250/0.490  1.85/3.60    1.72/3.38
//   pingpong 192x128         0.225/0.425  0.250/0.490  1.85/3.60    1.72/3.38
//   pingpong 128x128         0.225/0.415  0.265/0.505  1.85/3.55    1.69/3.33
// Cooperative: M3's 77.7% of the tensor peak at K = 256, 87% at 512 and 97% from 2048 on. Pingpong:
// what is left exposed is the ring's refill and the change of warpgroups, so 90%, 94% and 98%,
// where tiles divide the size; 192 wastes 3.1% of 4096 columns and of 2048 rows, 5% of 2560 rows.
// 128x128: 5% less at K = 256, where M3's mainloop fell to 92%. Vector stores: as tensor stores, or
// 2% slower at K = 256 (the math warps wait for their own stores' queue). Pairs: within 1%, as in
// M3.
#include "cublas.cuh"
#include "pingpong.cuh"
#include "power.cuh"

namespace {

using namespace experiment;
using pingpong::Pair;
using pingpong::Schedule;
using pingpong::Store;

constexpr Major kK = Major::kK;

// Either kernel, or cuBLAS.
struct Candidate {
  std::string name;
  bool lasting;  // its power is measured by default
  // The launch on a problem; cycles [blocks], which cuBLAS leaves alone.
  std::function<std::function<void()>(const BmmProblem&, uint64_t* cycles)> bind;
};

template <pingpong::Shape kShape>
Candidate candidate(bool lasting = false) {
  const pingpong::Variant v = pingpong::make_variant<kShape>();
  return {v.name, lasting, [v](const BmmProblem& problem, uint64_t* cycles) {
            const pingpong::Params p = pingpong::make_params(problem, v, cycles);
            return [v, p] { pingpong::launch(v, p); };
          }};
}

// The kernel of M3 with production's epilogue warps.
template <MainloopShape kShape>
Candidate mainloop_candidate(bool lasting = false) {
  const MainloopVariant v = mainloop_variant<kShape>();
  return {"epilogue warps, " + v.name, lasting, [v](const BmmProblem& problem, uint64_t* cycles) {
            const MainloopParams p = make_params(problem, v, cycles);
            return [v, p] { launch(v, p); };
          }};
}

// Products with A K-major and B as given: K-major for down, MN-major for dX~.
template <Major kB>
std::vector<Candidate> candidates() {
  constexpr Schedule kCooperative = Schedule::kCooperative, kPingpong = Schedule::kPingpong;
  constexpr Pair kNone = Pair::kNone, kA = Pair::kSharedA, kSharedB = Pair::kSharedB;
  constexpr Store kVectors = Store::kVectors;
  return {
      mainloop_candidate<MainloopShape{256, 3, 1, kK, kB, Output::kStore}>(true),
      mainloop_candidate<MainloopShape{256, 3, 2, kK, kB, Output::kStore}>(),
      candidate<pingpong::Shape{kCooperative, 128, 256, kNone, kB}>(),
      candidate<pingpong::Shape{kCooperative, 256, 128, kA, kB}>(),
      candidate<pingpong::Shape{kPingpong, 128, 128, kNone, kB}>(true),
      candidate<pingpong::Shape{kPingpong, 128, 128, kNone, kB, kVectors}>(),
      candidate<pingpong::Shape{kPingpong, 128, 128, kA, kB}>(),
      candidate<pingpong::Shape{kPingpong, 128, 192, kNone, kB}>(true),
      candidate<pingpong::Shape{kPingpong, 128, 192, kNone, kB, kVectors}>(true),
      candidate<pingpong::Shape{kPingpong, 128, 192, kA, kB}>(),
      candidate<pingpong::Shape{kPingpong, 128, 192, kSharedB, kB}>(),
      candidate<pingpong::Shape{kPingpong, 192, 128, kNone, kB}>(true),
      candidate<pingpong::Shape{kPingpong, 192, 128, kNone, kB, kVectors}>(),
      candidate<pingpong::Shape{kPingpong, 192, 128, kA, kB}>(),
  };
}

void check_all(const std::vector<Candidate>& all, Major b) {
  DeviceBuffer<uint64_t> cycles(132);
  // Many tiles per CTA, so that rings and slots wrap at every offset between tiles and stages; k
  // counts around the stages; sizes that no tile divides; fewer tiles than CTAs.
  const BmmProblem exact({"exact", 9, 512, 1536, 256, 9}, Fill::kTernary);
  const BmmProblem many({"many", 40, 512, 1536, 256, 40}, Fill::kTernary);
  const BmmProblem one_k({"one k-tile", 40, 512, 768, 64, 40}, Fill::kTernary);
  const BmmProblem ragged({"ragged", 40, 1280, 832, 192, 40}, Fill::kTernary);
  const BmmProblem few({"few", 2, 256, 320, 256, 2}, Fill::kTernary);
  const BmmProblem real({"real", 20, 1024, 768, 1088, 20}, Fill::kNormal);
  for (const Candidate& c : all) {
    const auto check = [&](const BmmProblem& problem, int64_t samples, bool is_exact) {
      check_against_fp64(problem, c.name, kK, b, samples, is_exact, c.bind(problem, cycles.data()));
    };
    check(exact, exact.d.size(), true);
    check(few, few.d.size(), true);
    for (const BmmProblem* p : {&many, &one_k, &ragged}) check(*p, 1 << 19, true);
    check(real, 1 << 17, false);
  }
}

Candidate cublas_candidate(const Cublas& cublas, Major b) {
  return {"cuBLAS", true, [&cublas, b](const BmmProblem& problem, uint64_t*) {
            return [&cublas, &problem, b] { cublas.multiply(problem, kK, b); };
          }};
}

// Of the FLOPs asked for: what tiles waste at the edges counts as idle.
double busy(const BmmSize& s, double clocks) { return s.flops() / (kFlopsPerClock * clocks); }

void time_all(const BmmProblem& problem, const std::vector<Candidate>& all, int rounds) {
  const BmmSize& s = problem.size;
  std::vector<DeviceBuffer<uint64_t>> cycles;
  for (size_t i = 0; i < all.size(); ++i) {
    cycles.emplace_back(132);
    cycles.back().fill_bytes(0);
  }
  std::vector<std::function<void()>> launches;
  for (size_t i = 0; i < all.size(); ++i)
    launches.push_back(all[i].bind(problem, cycles[i].data()));
  const std::vector<Timing> timings = time_interleaved(launches, rounds);
  for (size_t i = 0; i < all.size(); ++i) {
    Row row("m13_pingpong", all[i].name);
    row.text("size", s.name)
        .timing(timings[i])
        .number("tflops", s.flops() / timings[i].median * 1e-9);
    const double clocks = median_cycles(cycles[i]);
    if (clocks > 0) {
      row.number("clocks", clocks)
          .number("tensor_busy", busy(s, clocks))
          .number("clock_mhz", clocks / timings[i].median * 1e-3);
    }
    row.print();
  }
}

void measure_all(const BmmProblem& problem, const std::vector<Candidate>& all, bool every,
                 const Nvml& nvml) {
  DeviceBuffer<uint64_t> cycles(132);
  for (const Candidate& c : all) {
    if (!every && !c.lasting) continue;
    print_power("m13_power", c.name, problem.size.name,
                measure_power(nvml, c.bind(problem, cycles.data()), 0.5, 0.6),
                problem.size.flops());
  }
}

struct Case {
  const char* name;
  int E, rows, d, n;  // rows of an expert
};

}  // namespace

int main(int argc, char** argv) {
  install_wait_report();
  const Cublas cublas;
  const Nvml nvml;
  const bool only_power = argc > 1 && std::string(argv[1]) == "power";
  const std::string power_case = argc > 2 ? argv[2] : "7B-n256";
  std::vector<Candidate> down = candidates<Major::kK>(), input = candidates<Major::kMn>();
  if (!only_power) {
    check_all(down, Major::kK);
    check_all(input, Major::kMn);
  }
  if (cublas.available()) {
    down.push_back(cublas_candidate(cublas, Major::kK));
    input.push_back(cublas_candidate(cublas, Major::kMn));
  }
  const Case cases[] = {{"7B-n256", 128, 1536, 1536, 256},
                        {"1.4B-n256", 128, 2560, 768, 256},
                        {"30B-n256", 256, 2048, 4096, 256},
                        {"30B-n1024", 64, 2048, 4096, 1024}};
  DeviceBuffer<uint64_t> cycles(132);
  for (const Case& c : cases) {
    for (const bool is_down : {true, false}) {
      const std::string name = format("%s %s", c.name, is_down ? "down" : "dX~");
      const std::vector<Candidate>& all = is_down ? down : input;
      const bool measured = nvml.available() && power_case == c.name;
      if (g_failures != 0 || (only_power && !measured)) continue;
      const BmmProblem problem({name.c_str(), c.E, c.rows, c.d, is_down ? c.n : 2 * c.n, c.E},
                               Fill::kNormal);
      // Outputs beyond 2^31 elements, too.
      for (const Candidate& one : all) {
        check_against_fp64(problem, one.name, kK, is_down ? Major::kK : Major::kMn, 1 << 14, false,
                           one.bind(problem, cycles.data()));
      }
      if (!only_power) time_all(problem, all, 15);
      if (measured) measure_all(problem, all, only_power, nvml);
    }
  }
  return finish();
}
