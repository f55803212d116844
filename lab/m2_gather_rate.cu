// M2: how fast one SM can gather 128 token rows x 128 bytes per k-tile into a swizzled stage, with
// nothing but a consumer that frees the stage at once: one TMA box of 64x1 per row against cp.async
// in the strict form (wait, proxy fence, arrive) and the noinc form, with 1 or 2 loader warps, from
// X in L2 and in DRAM, without and with the 256-row B box (32 KB) that shares the stage. The MMA at
// peak needs 16 bytes/clk of A and 32 of B.
#include <memory>

#include "cuda/hopper/tile/swizzle.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/tma.cuh"
#include "harness.cuh"
#include "ptx_extra.cuh"

namespace {

using namespace experiment;
namespace ptx = sonicmoe::ptx;
namespace tile = sonicmoe::tile;
using tile::Role;
using tile::Slot;

enum class Method { kTmaRows, kTmaBox, kStrict, kNoinc };

// Where a gather warp keeps its rows: one shared load before each copy; four rows per 16-byte
// shared load, a batch of loads before a batch of copies; or registers for the whole tile.
enum class Index { kShared, kSharedBatch, kRegisters };

struct Shape {
  Method method;
  int warps;  // loader warps
  int stages;
  bool with_b;
  Index index = Index::kRegisters;
};

template <Shape kShape>
struct Spec {
  static constexpr Shape shape = kShape;
  static constexpr bool tma = kShape.method == Method::kTmaRows || kShape.method == Method::kTmaBox;
  static constexpr int a_bytes = 128 * 128;
  static constexpr int b_bytes = kShape.with_b ? 256 * 128 : 0;
  static constexpr int stage_bytes = a_bytes + b_bytes;
  static constexpr int shared_bytes = 2048 + kShape.stages * stage_bytes;
  // One arrival brings the expected bytes (none for cp.async without B); then the gather's own.
  static constexpr int full_arrivals =
      tma ? 1
          : (kShape.with_b ? 1 : 0) +
                (kShape.method == Method::kStrict ? kShape.warps : 32 * kShape.warps);
  static constexpr int rows_per_warp = 128 / kShape.warps;
};

struct Params {
  CUtensorMap x_rows;  // [T, d], box 64x1
  CUtensorMap x_box;   // [T, d], box 64x128
  CUtensorMap b;       // [N, d], box 64x256
  const bf16* x;       // [T, d]
  const int* rows;     // [tiles, 128] token rows
  bf16* out;           // [tiles, 128, d] or null: the gathered rows, for the check
  uint64_t* cycles;    // [blocks]
  int tiles, d, b_tiles;
};

template <class S>
__device__ void load(const Params& p, uint32_t bars, uint32_t ring, uint32_t indices, int warp,
                     int lane) {
  constexpr Shape shape = S::shape;
  tile::RingState<shape.stages> state;
  uint32_t pending = 0;
  bool has_pending = false;
  auto full = [&](uint32_t s) { return bars + 8 * s; };
  auto empty = [&](uint32_t s) { return bars + 8 * (shape.stages + s); };
  auto flush = [&] {  // strict form: everything issued so far has landed
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(full(pending));
  };
  const int row0 = warp * S::rows_per_warp;
  constexpr int kCopies = S::rows_per_warp / 4;  // per lane and k-tile: row row0 + 4i + lane / 8
  uint32_t offsets[kCopies];                     // of the row in X, in 16-byte chunks
  for (int t = blockIdx.x; t < p.tiles; t += gridDim.x) {
    __syncwarp();
    for (int r = lane; r < S::rows_per_warp; r += 32) {
      const int row = p.rows[t * 128 + row0 + r];
      if (shape.index == Index::kSharedBatch && !S::tma) {
        const int position = r / 16 * 16 + r % 4 * 4 + r / 4 % 4;  // i % 4 fastest, then lane / 8
        ptx_extra::store_shared(indices + 4 * (row0 + position), row * (p.d / 8));
      } else {
        ptx_extra::store_shared(indices + 4 * (row0 + r), row);
      }
    }
    __syncwarp();
    if constexpr (shape.index == Index::kRegisters && !S::tma) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        offsets[i] = ptx_extra::load_shared(indices + 4 * (row0 + i * 4 + lane / 8)) * (p.d / 8);
      }
    }
    for (int k = 0; k < p.d / 64; ++k) {
      const uint32_t bar = full(state.stage);
      if constexpr (shape.method == Method::kStrict) {
        if (has_pending && !ptx::mbarrier_try_wait(empty(state.stage), state.parity ^ 1)) {
          ptx::cp_async_wait_group<0>();
          flush();
          has_pending = false;
        }
      }
      tile::wait(empty(state.stage), state.parity ^ 1, Role::kLoader, Slot::kEmpty, state.stage);
      const uint32_t a = ring + state.stage * S::stage_bytes;
      if (warp == 0 && lane == 0 && (S::tma || shape.with_b)) {
        ptx::mbarrier_arrive_expect_tx(bar, S::b_bytes + (S::tma ? S::a_bytes : 0));
        if constexpr (shape.with_b) {
          ptx::tma_load(a + S::a_bytes, &p.b, bar, k * 64, (t % p.b_tiles) * 256);
        }
        if constexpr (shape.method == Method::kTmaBox) {
          ptx::tma_load(a, &p.x_box, bar, k * 64, ptx_extra::load_shared(indices));
        }
      }
      if constexpr (shape.method == Method::kTmaRows && shape.index == Index::kSharedBatch) {
        __syncwarp();
        if (ptx_extra::elect_one()) {  // uniform operands: no loop over the lanes around each copy
#pragma unroll 4
          for (int r = row0; r < row0 + S::rows_per_warp; r += 4) {
            const uint4 four = ptx::load_shared_v4(indices + 4 * r);
            ptx::tma_load(a + r * 128, &p.x_rows, bar, k * 64, four.x);
            ptx::tma_load(a + r * 128 + 128, &p.x_rows, bar, k * 64, four.y);
            ptx::tma_load(a + r * 128 + 256, &p.x_rows, bar, k * 64, four.z);
            ptx::tma_load(a + r * 128 + 384, &p.x_rows, bar, k * 64, four.w);
          }
        }
      } else if constexpr (shape.method == Method::kTmaRows) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < S::rows_per_warp / 32; ++i) {
          const int r = row0 + i * 32 + lane;
          ptx::tma_load(a + r * 128, &p.x_rows, bar, k * 64,
                        ptx_extra::load_shared(indices + 4 * r));
        }
      }
      if constexpr (!S::tma) {
        const int chunk = lane & 7;
        const uint4* source = reinterpret_cast<const uint4*>(p.x + k * 64 + chunk * 8);
        if constexpr (shape.index == Index::kShared) {
#pragma unroll 8
          for (int i = 0; i < kCopies; ++i) {
            const int r = row0 + i * 4 + lane / 8;
            const uint32_t row = ptx_extra::load_shared(indices + 4 * r);
            ptx::cp_async_16(a + tile::chunk_offset(r, chunk), source + row * (p.d / 8));
          }
        } else {
          if constexpr (shape.index == Index::kSharedBatch) {
#pragma unroll
            for (int i = 0; i < kCopies; i += 4) {
              const uint4 four = ptx::load_shared_v4(indices + 4 * (row0 + i * 4) + lane / 8 * 16);
              offsets[i] = four.x;
              offsets[i + 1] = four.y;
              offsets[i + 2] = four.z;
              offsets[i + 3] = four.w;
            }
          }
#pragma unroll
          for (int i = 0; i < kCopies; ++i) {
            const int r = row0 + i * 4 + lane / 8;
            ptx::cp_async_16(a + tile::chunk_offset(r, chunk), source + offsets[i]);
          }
        }
        if constexpr (shape.method == Method::kNoinc) {
          ptx::cp_async_mbarrier_arrive_noinc(bar);
        } else {
          ptx::cp_async_commit_group();
          if (has_pending) {
            ptx::cp_async_wait_group<1>();
            flush();
          }
          pending = state.stage;
          has_pending = true;
        }
      }
      state.advance();
    }
  }
  if (shape.method == Method::kStrict && has_pending) {
    ptx::cp_async_wait_group<0>();
    flush();
  }
}

template <class S>
__device__ void consume(const Params& p, uint32_t bars, uint32_t ring, int lane) {
  constexpr Shape shape = S::shape;
  tile::RingState<shape.stages> state;
  for (int t = blockIdx.x; t < p.tiles; t += gridDim.x) {
    for (int k = 0; k < p.d / 64; ++k) {
      tile::wait(bars + 8 * state.stage, state.parity, Role::kMath, Slot::kFull, state.stage);
      if (p.out != nullptr) {
        const uint32_t a = ring + state.stage * S::stage_bytes;
        for (int i = lane; i < 128 * 8; i += 32) {
          const uint4 v = ptx::load_shared_v4(a + tile::chunk_offset(i / 8, i % 8));
          ptx::store_global_v4(p.out + (int64_t{t} * 128 + i / 8) * p.d + k * 64 + (i % 8) * 8, v);
        }
      }
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(bars + 8 * (shape.stages + state.stage));
      state.advance();
    }
  }
}

template <class S>
__global__ void __launch_bounds__(128, 1) gather_rate(const __grid_constant__ Params p) {
  extern __shared__ uint8_t shared[];
  const uint32_t base = (ptx::shared_address(shared) + 1023) & ~1023u;
  const uint32_t ring = base + 1024, indices = base + 512;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < S::shape.stages; ++s) {
      ptx::mbarrier_init(base + 8 * s, S::full_arrivals);
      ptx::mbarrier_init(base + 8 * (S::shape.stages + s), 1);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const uint64_t start = clock64();
  if (warp < S::shape.warps) {
    load<S>(p, base, ring, indices, warp, lane);
  } else if (warp == 3) {
    consume<S>(p, base, ring, lane);
  }
  __syncthreads();
  if (threadIdx.x == 0) p.cycles[blockIdx.x] = clock64() - start;
}

struct Variant {
  std::string name;
  void (*kernel)(Params);
  int shared_bytes;
  bool contiguous, with_b;
};

template <Shape kShape>
Variant variant(const char* name) {
  using S = Spec<kShape>;
  CHECK_CUDA(cudaFuncSetAttribute(gather_rate<S>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  S::shared_bytes));
  const char* indices[] = {"row from shared memory each", "rows in batches", "rows in registers"};
  return {format("%s, %d warp(s), %d stages%s, %s", name, kShape.warps, kShape.stages,
                 kShape.with_b ? ", with B" : "", indices[static_cast<int>(kShape.index)]),
          gather_rate<S>, S::shared_bytes, kShape.method == Method::kTmaBox, kShape.with_b};
}

struct Problem {
  Problem(int tokens, int d, int tiles) : x(size_t(tokens) * d), d(d), tiles(tiles) {
    fill_random(x, 1);
    std::vector<int> random(tiles * 128), dense(tiles * 128);
    for (int i = 0; i < tiles * 128; ++i) {
      random[i] = hash(3, i) % tokens;
      dense[i] = i % tokens;
    }
    rows = DeviceBuffer<int>(random);
    dense_rows = DeviceBuffer<int>(dense);
    host_rows = random;
    host_dense_rows = dense;
    x_rows = make_tensor_map(x.data(), {uint64_t(d), uint64_t(tokens)}, {64, 1});
    x_box = make_tensor_map(x.data(), {uint64_t(d), uint64_t(tokens)}, {64, 128});
  }
  DeviceBuffer<bf16> x;
  int d, tiles;
  DeviceBuffer<int> rows, dense_rows;
  std::vector<int> host_rows, host_dense_rows;
  CUtensorMap x_rows, x_box;
};

Params make_params(const Problem& problem, const Variant& v, const CUtensorMap& b,
                   DeviceBuffer<uint64_t>& cycles, bf16* out) {
  return {problem.x_rows,
          problem.x_box,
          b,
          problem.x.data(),
          v.contiguous ? problem.dense_rows.data() : problem.rows.data(),
          out,
          cycles.data(),
          problem.tiles,
          problem.d,
          8};
}

bool correct(const Problem& problem, const Variant& v, const CUtensorMap& b,
             DeviceBuffer<uint64_t>& cycles) {
  DeviceBuffer<bf16> out(size_t(problem.tiles) * 128 * problem.d);
  out.fill_bytes(0xff);
  v.kernel<<<132, 128, v.shared_bytes>>>(make_params(problem, v, b, cycles, out.data()));
  CHECK_CUDA(cudaGetLastError());
  CHECK_CUDA(cudaDeviceSynchronize());
  const std::vector<bf16> got = out.to_host(), x = problem.x.to_host();
  const std::vector<int>& rows = v.contiguous ? problem.host_dense_rows : problem.host_rows;
  for (size_t r = 0; r < rows.size(); ++r) {
    if (std::memcmp(&got[r * problem.d], &x[size_t(rows[r]) * problem.d], problem.d * 2) != 0) {
      return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  install_wait_report();
  const std::vector<Variant> variants = {
      variant<Shape{Method::kTmaBox, 1, 3, false, Index::kShared}>("TMA box 64x128, contiguous"),
      variant<Shape{Method::kTmaRows, 1, 3, false, Index::kShared}>("TMA boxes 64x1, all lanes"),
      variant<Shape{Method::kTmaRows, 1, 3, false, Index::kSharedBatch}>(
          "TMA boxes 64x1, one lane"),
      variant<Shape{Method::kTmaRows, 2, 3, false, Index::kSharedBatch}>(
          "TMA boxes 64x1, one lane"),
      variant<Shape{Method::kNoinc, 1, 3, false, Index::kShared}>("cp.async noinc"),
      variant<Shape{Method::kNoinc, 1, 3, false, Index::kSharedBatch}>("cp.async noinc"),
      variant<Shape{Method::kNoinc, 1, 3, false, Index::kRegisters}>("cp.async noinc"),
      variant<Shape{Method::kNoinc, 1, 8, false, Index::kRegisters}>("cp.async noinc"),
      variant<Shape{Method::kNoinc, 2, 3, false, Index::kRegisters}>("cp.async noinc"),
      variant<Shape{Method::kNoinc, 2, 8, false, Index::kRegisters}>("cp.async noinc"),
      variant<Shape{Method::kStrict, 1, 3, false, Index::kShared}>("cp.async strict"),
      variant<Shape{Method::kStrict, 1, 3, false, Index::kSharedBatch}>("cp.async strict"),
      variant<Shape{Method::kStrict, 1, 3, false, Index::kRegisters}>("cp.async strict"),
      variant<Shape{Method::kStrict, 2, 3, false, Index::kRegisters}>("cp.async strict"),
      variant<Shape{Method::kStrict, 2, 8, false, Index::kRegisters}>("cp.async strict"),
      variant<Shape{Method::kTmaBox, 1, 3, true, Index::kShared}>("TMA box 64x128, contiguous"),
      variant<Shape{Method::kNoinc, 1, 3, true, Index::kRegisters}>("cp.async noinc"),
      variant<Shape{Method::kNoinc, 1, 4, true, Index::kRegisters}>("cp.async noinc"),
      variant<Shape{Method::kNoinc, 2, 3, true, Index::kRegisters}>("cp.async noinc"),
      variant<Shape{Method::kNoinc, 2, 4, true, Index::kRegisters}>("cp.async noinc"),
      variant<Shape{Method::kStrict, 1, 3, true, Index::kRegisters}>("cp.async strict"),
      variant<Shape{Method::kStrict, 2, 3, true, Index::kRegisters}>("cp.async strict"),
      variant<Shape{Method::kStrict, 2, 4, true, Index::kRegisters}>("cp.async strict"),
  };
  DeviceBuffer<bf16> weights(size_t(8) * 256 * 4096);
  fill_random(weights, 2);
  DeviceBuffer<uint64_t> cycles(132);

  {
    Problem small(1024, 512, 300);
    const CUtensorMap b = make_tensor_map(weights.data(), {512, 2048}, {64, 256});
    for (const Variant& v : variants) {
      expect(correct(small, v, b, cycles), "m2 " + v.name);
    }
  }
  const CUtensorMap b = make_tensor_map(weights.data(), {4096, 2048}, {64, 256});
  for (const bool in_l2 : {true, false}) {
    const Problem problem(in_l2 ? 2048 : 262144, 4096, 132 * 12);
    std::vector<std::function<void()>> launches;
    std::vector<DeviceBuffer<uint64_t>> clocks;
    for (size_t i = 0; i < variants.size(); ++i) clocks.emplace_back(132);
    for (size_t i = 0; i < variants.size(); ++i) {
      const Variant& v = variants[i];
      const Params p = make_params(problem, v, b, clocks[i], nullptr);
      launches.push_back([&v, p] { v.kernel<<<132, 128, v.shared_bytes>>>(p); });
    }
    const std::vector<Timing> timings = time_interleaved(launches, 9);
    for (size_t i = 0; i < variants.size(); ++i) {
      const double bytes = double(problem.tiles) * 128 * problem.d * 2;
      const double per_sm = bytes / 132 / median_cycles(clocks[i]);
      Row("m2_gather_rate", variants[i].name)
          .text("x", in_l2 ? "L2 (17 MB)" : "DRAM (2.1 GB)")
          .timing(timings[i])
          .number("a_bytes_per_clk_sm", per_sm)
          .number("stage_bytes_per_clk_sm", per_sm * (variants[i].with_b ? 3 : 1))
          .number("a_tb_s", bytes / timings[i].median * 1e-9)
          .print();
    }
  }
  return finish();
}
