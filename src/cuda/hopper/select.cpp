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

std::string not_a_multiple(const char* what, std::int64_t value) {
  return std::string(what) + " = " + std::to_string(value) + " is not a multiple of 8";
}

std::string check_shape(const ExpertCall& call) {
  const MoEShape& s = call.shape;
  if (s.dtype != DType::kBFloat16) return "the tensor cores take bfloat16 only";
  if (s.hidden_size % kVector != 0) return not_a_multiple("hidden_size", s.hidden_size);
  if (s.intermediate_size % kVector != 0) {
    return not_a_multiple("intermediate_size", s.intermediate_size);
  }
  if (s.num_pairs > std::numeric_limits<std::int32_t>::max()) return "more than 2^31 rows";
  return {};
}

std::string check_matrix(const char* name, const Matrix& m, std::int64_t rows) {
  if (!aligned(m.data)) return std::string(name) + " is not 16-byte aligned";
  if (m.ld % kVector != 0)
    return not_a_multiple((std::string(name) + "'s row stride").c_str(), m.ld);
  if (rows * (m.ld / kVector) > std::numeric_limits<std::uint32_t>::max()) {
    return std::string(name) + " has more than 2^35 elements";
  }
  return {};
}

// A weight or its gradient: one of the last strides 1, everything else in steps of 16 bytes.
std::string check_strided(const char* name, const ConstTensorView& w, std::int64_t vector) {
  if (!aligned(w.data())) return std::string(name) + " is not 16-byte aligned";
  const int unit = depth_has_unit_stride(w, 2) ? 2 : 1;
  for (int i = 0; i < 3; ++i) {
    if (i == unit ? w.stride(i) == 1 || w.size(i) == 1
                  : w.stride(i) % vector == 0 || w.size(i) == 1) {
      continue;
    }
    return std::string(name) + "'s stride " + std::to_string(w.stride(i)) + " of dimension " +
           std::to_string(i) + " is not a multiple of " + std::to_string(vector);
  }
  return {};
}

std::string check_bias(const char* name, const ConstTensorView& bias) {
  if (!bias.defined() || bias.stride(1) == 1 || bias.size(1) == 1) return {};
  return std::string(name) + " has no unit stride";
}

std::string check_gradient(const char* name, const TensorView& w) {
  return check_strided(name, w, w.dtype() == DType::kFloat32 ? 2 : kVector);
}

// The first that is not empty.
template <class... Reasons>
std::string first_of(Reasons... reasons) {
  std::string result;
  ((result.empty() ? void(result = reasons) : void()), ...);
  return result;
}

// A gated concatenated weight needs its second half to start at a multiple of 16 bytes.
std::string check_halves(const ExpertCall& call, const ConstTensorView& w1) {
  const bool concatenated =
      is_gated(call.shape.activation) && call.options.gate_up_layout == GateUpLayout::kConcatenated;
  const std::int64_t offset = call.shape.intermediate_size * w1.stride(1);
  return concatenated && offset % kVector != 0 ? not_a_multiple("the up rows' offset", offset)
                                               : std::string();
}

std::string check_slab(std::int64_t first_column, std::int64_t num_columns) {
  if (first_column % kVector != 0) return not_a_multiple("the slab's first column", first_column);
  return num_columns % kVector != 0 ? not_a_multiple("the slab's width", num_columns)
                                    : std::string();
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

std::string reason_against(const ExpertCall& call, const UpArgs& args) {
  return first_of(check_shape(call), check_matrix("x", args.x, call.shape.num_tokens),
                  check_strided("w1", args.w1, kVector), check_bias("b1", args.b1),
                  check_halves(call, args.w1));
}

std::string reason_against(const ExpertCall& call, const DownArgs& args) {
  return first_of(check_shape(call), check_strided("w2", args.w2, kVector),
                  check_matrix("out", args.out, 0), check_bias("b2", args.b2),
                  check_slab(args.first_column, args.num_columns));
}

std::string reason_against(const ExpertCall& call, const HiddenGradientArgs& args) {
  return first_of(check_shape(call), check_matrix("grad_out", args.grad_out, call.shape.num_tokens),
                  check_strided("w2", args.w2, kVector));
}

std::string reason_against(const ExpertCall& call, const InputGradientArgs& args) {
  return first_of(check_shape(call), check_strided("w1", args.w1, kVector),
                  check_matrix("out", args.out, 0),
                  check_slab(args.first_column, args.num_columns));
}

std::string reason_against(const ExpertCall& call, const DownWeightGradientArgs& args) {
  return first_of(check_shape(call), check_matrix("grad_out", args.grad_out, call.shape.num_tokens),
                  check_gradient("grad_w2", args.grad_w2));
}

std::string reason_against(const ExpertCall& call, const UpWeightGradientArgs& args) {
  return first_of(check_shape(call), check_matrix("x", args.x, call.shape.num_tokens),
                  check_gradient("grad_w1", args.grad_w1));
}

}  // namespace sonicmoe::cuda::hopper
