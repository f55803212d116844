#include "cuda/hopper/select.hpp"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string_view>

namespace sonicmoe::cuda::hopper {
namespace {

constexpr std::int64_t kVector = 8;  // bf16 values in 16 bytes

// The number in an environment variable, 0 where there is none.
int number_from_environment(const char* name) {
  const char* text = std::getenv(name);
  return text == nullptr ? 0 : std::atoi(text);
}

bool aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; }

using Reason = std::optional<Objection>;

Reason not_a_multiple(const char* argument, const std::string& what, std::int64_t value,
                      std::int64_t vector = kVector) {
  return Objection{argument, what + " a multiple of " + std::to_string(vector) + " on a GPU",
                   std::to_string(value)};
}

Reason not_aligned(const char* argument) {
  return Objection{argument, "16-byte alignment on a GPU", "an unaligned address"};
}

Reason check_shape(const ExpertCall& call) {
  const MoEShape& s = call.shape;
  if (s.numerics != Numerics::of(DType::kBFloat16)) {
    return Objection{"x", "bfloat16 on a GPU", to_string(s.numerics)};
  }
  if (s.hidden_size % kVector != 0) return not_a_multiple("x", "hidden_size", s.hidden_size);
  if (s.intermediate_size % kVector != 0) {
    return not_a_multiple("w2", "intermediate_size", s.intermediate_size);
  }
  return {};
}

Reason check_matrix(const char* name, const Matrix& m, std::int64_t rows) {
  if (!aligned(m.data)) return not_aligned(name);
  if (m.ld % kVector != 0) return not_a_multiple(name, "a row stride", m.ld);
  if (rows * (m.ld / kVector) > std::numeric_limits<std::uint32_t>::max()) {
    return Objection{name, "at most 2^35 elements on a GPU",
                     std::to_string(rows) + " rows of " + std::to_string(m.ld)};
  }
  return {};
}

// A weight or its gradient: one of the last strides 1, everything else in steps of 16 bytes.
Reason check_strided(const char* name, const ConstTensorView& w, std::int64_t vector) {
  if (!aligned(w.data())) return not_aligned(name);
  const int unit = depth_has_unit_stride(w, 2) ? 2 : 1;
  for (int i = 0; i < 3; ++i) {
    if (i == unit ? w.stride(i) == 1 || w.size(i) == 1
                  : w.stride(i) % vector == 0 || w.size(i) == 1) {
      continue;
    }
    const std::string what = "a stride of dimension " + std::to_string(i);
    return not_a_multiple(name, what, w.stride(i), vector);
  }
  return {};
}

Reason check_gradient(const char* name, const TensorView& w) {
  return check_strided(name, w, w.dtype() == DType::kFloat32 ? 2 : kVector);
}

// The first that there is.
template <class... Reasons>
Reason first_of(Reasons... reasons) {
  Reason result;
  ((result ? void() : void(result = reasons)), ...);
  return result;
}

// A gated concatenated weight needs its second half to start at a multiple of 16 bytes.
Reason check_halves(const ExpertCall& call, const ConstTensorView& w1) {
  const bool concatenated =
      is_gated(call.shape.activation) && call.options.gate_up_layout == GateUpLayout::kConcatenated;
  const std::int64_t offset = call.shape.intermediate_size * w1.stride(1);
  return concatenated && offset % kVector != 0 ? not_a_multiple("w1", "the up rows' offset", offset)
                                               : Reason();
}

// H is read and written by TMA.
Reason check_rows_of_h(const void* h) { return aligned(h) ? Reason() : not_aligned("h"); }

Reason check_slab(std::int64_t first_column, std::int64_t num_columns) {
  if (first_column % kVector != 0) {
    return not_a_multiple("workspace_limit", "a slab's first column", first_column);
  }
  return num_columns % kVector != 0
             ? not_a_multiple("workspace_limit", "a slab's width", num_columns)
             : Reason();
}

}  // namespace

int choose_block_n(std::int64_t columns) {
  const int forced = number_from_environment("SONICMOE_CUDA_BLOCK_N");
  if (forced == 128 || forced == 256) return forced;
  const std::int64_t wide = round_up(columns, 256), narrow = round_up(columns, 128);
  return narrow * 108 < wide * 100 ? 128 : 256;
}

int choose_gated_block_n(std::int64_t n) { return choose_block_n(2 * n); }

HiddenStorers choose_hidden_storers(std::int64_t hidden_size) {
  const char* text = std::getenv("SONICMOE_CUDA_HIDDEN_STORERS");
  const std::string_view forced = text == nullptr ? "" : text;
  if (forced == "math") return HiddenStorers::kThreeAndMath;
  if (forced == "three") return HiddenStorers::kThree;
  if (forced == "two") return HiddenStorers::kTwo;
  if (hidden_size >= 3072) return HiddenStorers::kTwo;
  return hidden_size < 2048 ? HiddenStorers::kThreeAndMath : HiddenStorers::kThree;
}

int choose_add_group(std::int64_t num_tokens, std::int64_t depth, int n_tiles, int block_n) {
  constexpr std::int64_t kMiB = 1 << 20, kMostDepth = 256, kFits = 64 * kMiB, kWindow = 34 * kMiB;
  const std::int64_t forced = number_from_environment("SONICMOE_CUDA_ADD_WINDOW") * kMiB;
  const std::int64_t tile = std::max<std::int64_t>(num_tokens * block_n * 2, 1);
  if (forced <= 0 && (depth > kMostDepth || tile * n_tiles <= kFits)) return n_tiles;
  const std::int64_t window = forced > 0 ? forced : kWindow;
  return static_cast<int>(std::clamp<std::int64_t>(window / tile, 1, n_tiles));
}

int choose_row_block(std::int64_t depth, std::int64_t columns) {
  constexpr std::int64_t kCached = 48 << 20;  // bytes; L2 has 50 MB on an H100, 60 on an H200
  constexpr int kSquare = 16, kMost = 1 << 16;
  const int forced = number_from_environment("SONICMOE_CUDA_ROW_BLOCK");
  if (forced > 0) return std::min(forced, kMost);
  return 2 * depth * columns > kCached ? kSquare : 1;
}

int grid_limit(int processors) {
  const int wanted = number_from_environment("SONICMOE_CUDA_GRID");
  return wanted > 0 ? wanted : processors;
}

bool depth_has_unit_stride(const ConstTensorView& w, int depth_dim) {
  const int other = 3 - depth_dim;
  if (w.stride(depth_dim) == 1 && w.size(depth_dim) > 1) return true;
  return w.stride(other) != 1 || w.size(other) == 1;
}

int partial_columns(const MoEShape& shape) { return choose_block_n(shape.intermediate_size); }

Reason reason_against(const ExpertCall& call, const UpArgs& args) {
  return first_of(check_shape(call), check_matrix("x", args.x, call.shape.num_tokens),
                  check_strided("w1", args.w1, kVector), check_halves(call, args.w1),
                  check_rows_of_h(args.h));
}

Reason reason_against(const ExpertCall& call, const DownArgs& args) {
  return first_of(check_shape(call), check_strided("w2", args.w2, kVector),
                  check_matrix("out", args.out, 0),
                  check_slab(args.first_column, args.num_columns));
}

Reason reason_against(const ExpertCall& call, const HiddenGradientArgs& args) {
  return first_of(check_shape(call), check_matrix("grad_out", args.grad_out, call.shape.num_tokens),
                  check_strided("w2", args.w2, kVector), check_rows_of_h(args.h));
}

Reason reason_against(const ExpertCall& call, const InputGradientArgs& args) {
  return first_of(check_shape(call), check_strided("w1", args.w1, kVector),
                  check_matrix("out", args.out, 0),
                  check_slab(args.first_column, args.num_columns));
}

Reason reason_against(const ExpertCall& call, const DownWeightGradientArgs& args) {
  return first_of(check_shape(call), check_matrix("grad_out", args.grad_out, call.shape.num_tokens),
                  check_gradient("grad_w2", args.grad_w2));
}

Reason reason_against(const ExpertCall& call, const UpWeightGradientArgs& args) {
  return first_of(check_shape(call), check_matrix("x", args.x, call.shape.num_tokens),
                  check_gradient("grad_w1", args.grad_w1));
}

}  // namespace sonicmoe::cuda::hopper
