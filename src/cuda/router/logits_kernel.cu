// logits [T, E] fp32 = x [T, d] bf16 · Wr [E, d]ᵀ bf16 + bias [E], on mma.sync.
// CTA tile 128 tokens x 128 experts, 8 warps of 32 x 64; 64 columns of d per stage, 3 stages filled
// by cp.async. Rows of a stage are 144 bytes apart, so that the 8 rows of an ldmatrix fall into
// different banks. Cost: x is read once per 128 experts; 110 KB of shared memory, two CTAs per SM.
#include <algorithm>

#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/router/bias.cuh"
#include "cuda/router/launch.hpp"
#include "cuda/router/logits_kernel.hpp"

namespace sonicmoe::cuda::router {
namespace {

using bf16 = __nv_bfloat16;

constexpr int kTile = 128;
constexpr int kDepth = 64;
constexpr int kStages = 3;
constexpr int kThreads = 256;
constexpr int kRowBytes = (kDepth + 8) * 2;
constexpr int kOperandBytes = kTile * kRowBytes;
constexpr int kStageBytes = 2 * kOperandBytes;
constexpr int kSharedBytes = kStages * kStageBytes;

struct Operand {
  const bf16* data;
  std::int64_t stride;
  std::int64_t rows;
};

struct LogitsParams {
  Operand x, weight;
  std::int64_t d;
  RouterBias bias;
  float* logits;  // [T, E]
};

// Starts the copies of rows [first, first + 128), columns [k, k + 64); zeros outside.
__device__ void load_operand(const Operand& o, std::int64_t first, std::int64_t k, std::int64_t d,
                             uint32_t destination) {
#pragma unroll
  for (int j = 0; j < kTile * (kDepth / 8) / kThreads; ++j) {
    const int index = static_cast<int>(threadIdx.x) + j * kThreads;
    const int row = index / (kDepth / 8);
    const int column = index % (kDepth / 8) * 8;
    const std::int64_t left = d - k - column;
    const bool inside = first + row < o.rows && left > 0;
    const bf16* source = inside ? o.data + (first + row) * o.stride + k + column : o.data;
    const uint32_t bytes = inside ? static_cast<uint32_t>(left < 8 ? left : 8) * 2 : 0;
    ptx::cp_async_16(destination + row * kRowBytes + column * 2, source, bytes);
  }
}

struct Accumulators {
  float d[2][8][4] = {};  // 16-row blocks, 8-column blocks, fragment
};

// One stage: 4 steps of 16 columns of d.
__device__ void multiply_stage(uint32_t a, uint32_t b, int lane, Accumulators& sums) {
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t left[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      ptx::load_matrix_x4(left[i], a + (16 * i + lane % 16) * kRowBytes + (k + lane / 16 * 8) * 2);
    }
#pragma unroll
    for (int j = 0; j < 8; j += 2) {  // matrices: experts j (k, k + 8), experts j + 1 (k, k + 8)
      uint32_t right[4];
      ptx::load_matrix_x4(
          right, b + (8 * j + lane / 16 * 8 + lane % 8) * kRowBytes + (k + lane / 8 % 2 * 8) * 2);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ptx::mma_m16n8k16_bf16(sums.d[i][j], left[i], right[0], right[1]);
        ptx::mma_m16n8k16_bf16(sums.d[i][j + 1], left[i], right[2], right[3]);
      }
    }
  }
}

__device__ void store(const LogitsParams& p, std::int64_t first_token, std::int64_t first_expert,
                      int lane, const Accumulators& sums) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const std::int64_t t = first_token + 16 * i + lane / 4 + v / 2 * 8;
        const std::int64_t e = first_expert + 8 * j + lane % 4 * 2 + v % 2;
        if (t < p.x.rows && e < p.weight.rows) {
          p.logits[t * p.weight.rows + e] = sums.d[i][j][v] + p.bias[e];
        }
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads, 2) logits_kernel(LogitsParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t base = ptx::shared_address(shared);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const std::int64_t first_token = std::int64_t{blockIdx.x} * kTile;
  const std::int64_t first_expert = std::int64_t{blockIdx.y} * kTile;
  const int steps = static_cast<int>((p.d + kDepth - 1) / kDepth);
  const auto fill = [&](int step) {
    if (step < steps) {
      const uint32_t stage = base + step % kStages * kStageBytes;
      load_operand(p.x, first_token, std::int64_t{step} * kDepth, p.d, stage);
      load_operand(p.weight, first_expert, std::int64_t{step} * kDepth, p.d, stage + kOperandBytes);
    }
    ptx::cp_async_commit_group();  // possibly empty: keeps the count of groups uniform
  };
  for (int step = 0; step < kStages - 1; ++step) fill(step);

  Accumulators sums;
  const int row = warp / 2 * 32;
  const int column = warp % 2 * 64;
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait_group<kStages - 2>();
    __syncthreads();  // the stage has landed for all, and all have left the stage filled next
    fill(step + kStages - 1);
    const uint32_t stage = base + step % kStages * kStageBytes;
    multiply_stage(stage + row * kRowBytes, stage + kOperandBytes + column * kRowBytes, lane, sums);
  }
  ptx::cp_async_wait_group<0>();
  store(p, first_token + row, first_expert + column, lane, sums);
}

bool rows_are_aligned(const ConstTensorView& view) {
  return view.dtype() == DType::kBFloat16 &&
         reinterpret_cast<std::uintptr_t>(view.data()) % 16 == 0 &&
         (view.size(0) <= 1 || view.stride(0) % 8 == 0);
}

Operand operand_of(const ConstTensorView& view) {
  return {static_cast<const bf16*>(view.data()), view.stride(0), view.size(0)};
}

}  // namespace

bool tensor_core_logits_fit(const ConstTensorView& x, const ConstTensorView& weight) {
  return rows_are_aligned(x) && rows_are_aligned(weight);
}

void launch_tensor_core_logits(cudaStream_t stream, const ConstTensorView& x,
                               const ConstTensorView& weight, const ConstTensorView& bias,
                               const TensorView& logits) {
  const LogitsParams p{operand_of(x), operand_of(weight), x.size(1), RouterBias(bias),
                       logits.as<float>()};
  check_cuda(cudaFuncSetAttribute(logits_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  kSharedBytes),
             "router_logits");
  const dim3 grid(static_cast<unsigned>(ceil_div(x.size(0), kTile)),
                  static_cast<unsigned>(ceil_div(weight.size(0), kTile)));
  logits_kernel<<<grid, kThreads, kSharedBytes, stream>>>(p);
  check_launch("router_logits");
}

}  // namespace sonicmoe::cuda::router
