#include "cpu/router_gemm.hpp"

#include "core/parallel.hpp"
#include "core/workspace.hpp"
#include "cpu/panels.hpp"
#include "cpu/weight_gradient.hpp"

namespace sonicmoe::cpu {
namespace {

// Widths of d and E handled together; every product is computed in float32.
constexpr std::int64_t kRowBlock = Tile<float>::kRows;
constexpr std::int64_t kDepthBlock = 256;
constexpr std::int64_t kExpertBlock = 256;

struct Scratch {
  float* left;     // [kRowBlock, max(kDepthBlock, kExpertBlock)]
  float* right;    // [kRowBlock or kExpertBlock, kDepthBlock]
  float* product;  // [kExpertBlock, kDepthBlock]

  static Scratch carve(WorkspaceCarver& carver) {
    Scratch s;
    s.left = carver.take<float>(panel_size(kRowBlock, std::max(kDepthBlock, kExpertBlock)));
    s.right = carver.take<float>(panel_size(std::max(kRowBlock, kExpertBlock), kDepthBlock));
    s.product = carver.take<float>(kExpertBlock * kDepthBlock);
    return s;
  }
};

Scratch thread_scratch(void* workspace, int thread) {
  WorkspaceCarver one;
  Scratch::carve(one);
  WorkspaceCarver mine(static_cast<std::byte*>(workspace) +
                       static_cast<std::size_t>(thread) * one.used());
  return Scratch::carve(mine);
}

// Rows and columns of x or Wr, of either dtype, as a float32 operand.
Operand<float> load_any(const ConstTensorView& matrix, std::int64_t first, std::int64_t rows,
                        std::int64_t column, std::int64_t columns, float* scratch) {
  if (matrix.dtype() == DType::kFloat32) {
    return load_rows<float, float>(row_source<float>(matrix, nullptr), first, rows, column, columns,
                                   scratch);
  }
  return load_rows<bfloat16, float>(row_source<bfloat16>(matrix, nullptr), first, rows, column,
                                    columns, scratch);
}

void add_bias(const ConstTensorView& bias, float* row, std::int64_t count) {
  if (bias.dtype() == DType::kFloat32) {
    axpy(1.0f, bias.as<float>(), row, count);
  } else {
    axpy(1.0f, bias.as<bfloat16>(), row, count);
  }
}

}  // namespace

std::size_t router_gemm_workspace_bytes(int threads) {
  WorkspaceCarver one;
  Scratch::carve(one);
  return static_cast<std::size_t>(threads) * one.used();
}

void router_logits(int threads, const ConstTensorView& x, const ConstTensorView& weight,
                   const ConstTensorView& bias, const TensorView& logits, void* workspace) {
  const std::int64_t num_tokens = x.size(0);
  const std::int64_t d = x.size(1);
  const std::int64_t num_experts = weight.size(0);
  parallel_for(threads, ceil_div(num_tokens, kRowBlock), [&](std::int64_t block, int thread) {
    const Scratch s = thread_scratch(workspace, thread);
    const std::int64_t first = block * kRowBlock;
    const std::int64_t rows = std::min(kRowBlock, num_tokens - first);
    float* out = logits.as<float>() + first * num_experts;
    for (std::int64_t c = 0; c < d; c += kDepthBlock) {
      const std::int64_t depth = std::min(kDepthBlock, d - c);
      const Operand<float> a = load_any(x, first, rows, c, depth, s.left);
      for (std::int64_t e = 0; e < num_experts; e += kExpertBlock) {
        const std::int64_t experts = std::min(kExpertBlock, num_experts - e);
        const Operand<float> b = load_any(weight, e, experts, c, depth, s.right);
        gemm(rows, experts, depth, a, b.transposed(), out + e, num_experts, c > 0);
      }
    }
    if (!bias.defined()) return;
    for (std::int64_t r = 0; r < rows; ++r) add_bias(bias, out + r * num_experts, num_experts);
  });
}

void router_grad_x(int threads, const ConstTensorView& grad_logits, const ConstTensorView& weight,
                   const TensorView& grad_x, void* workspace) {
  static_assert(kRowBlock <= kExpertBlock, "a block of rows has to fit into the product");
  const std::int64_t num_tokens = grad_logits.size(0);
  const std::int64_t num_experts = grad_logits.size(1);
  const std::int64_t d = weight.size(1);
  parallel_for(threads, ceil_div(num_tokens, kRowBlock), [&](std::int64_t block, int thread) {
    const Scratch s = thread_scratch(workspace, thread);
    const std::int64_t first = block * kRowBlock;
    const std::int64_t rows = std::min(kRowBlock, num_tokens - first);
    for (std::int64_t c = 0; c < d; c += kDepthBlock) {
      const std::int64_t columns = std::min(kDepthBlock, d - c);
      for (std::int64_t e = 0; e < num_experts; e += kExpertBlock) {
        const std::int64_t experts = std::min(kExpertBlock, num_experts - e);
        const Operand<float> a = load_any(grad_logits, first, rows, e, experts, s.left);
        const Operand<float> b = load_any(weight, e, experts, c, columns, s.right);
        gemm(rows, columns, experts, a, b, s.product, kDepthBlock, e > 0);
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        put(s.product + r * kDepthBlock, grad_x, (first + r) * grad_x.stride(0) + c, columns,
            /*add=*/false);
      }
    }
  });
}

void router_logits_backward(int threads, const ConstTensorView& x,
                            const ConstTensorView& grad_logits, const TensorView& grad_weight,
                            const TensorView& grad_bias, bool accumulate, void* workspace) {
  const std::int64_t num_tokens = x.size(0);
  const std::int64_t d = x.size(1);
  const std::int64_t num_experts = grad_logits.size(1);
  const std::int64_t depth_blocks = ceil_div(d, kDepthBlock);
  const std::int64_t expert_blocks = ceil_div(num_experts, kExpertBlock);
  const std::int64_t tasks = grad_weight.defined() ? expert_blocks * depth_blocks : 0;
  parallel_for(threads, tasks, [&](std::int64_t task, int thread) {
    const Scratch s = thread_scratch(workspace, thread);
    const std::int64_t e = task / depth_blocks * kExpertBlock;
    const std::int64_t c = task % depth_blocks * kDepthBlock;
    const std::int64_t experts = std::min(kExpertBlock, num_experts - e);
    const std::int64_t columns = std::min(kDepthBlock, d - c);
    if (num_tokens == 0) std::fill_n(s.product, experts * kDepthBlock, 0.0f);
    for (std::int64_t t = 0; t < num_tokens; t += kRowBlock) {
      const std::int64_t rows = std::min(kRowBlock, num_tokens - t);
      const Operand<float> a = load_any(grad_logits, t, rows, e, experts, s.left);
      const Operand<float> b = load_any(x, t, rows, c, columns, s.right);
      gemm(experts, columns, rows, a.transposed(), b, s.product, kDepthBlock, t > 0);
    }
    for (std::int64_t i = 0; i < experts; ++i) {
      put(s.product + i * kDepthBlock, grad_weight, (e + i) * grad_weight.stride(0) + c, columns,
          accumulate);
    }
  });
  if (!grad_bias.defined()) return;
  float* sums = thread_scratch(workspace, 0).product;
  for (std::int64_t e = 0; e < num_experts; e += kExpertBlock) {
    const std::int64_t experts = std::min(kExpertBlock, num_experts - e);
    std::fill_n(sums, experts, 0.0f);
    for (std::int64_t t = 0; t < num_tokens; ++t) {
      axpy(1.0f, grad_logits.as<float>() + t * num_experts + e, sums, experts);
    }
    put(sums, grad_bias, e, experts, accumulate);
  }
}

}  // namespace sonicmoe::cpu
