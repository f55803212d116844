// What the calls of support/operations.hpp are made from: sizes, memory and settings of options.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "rig/operations.hpp"
#include "rig/random.hpp"

namespace sonicmoe::rig {

/// How often a call has two threads: they take longer than such small shapes do.
#if defined(__SANITIZE_THREAD__)
inline constexpr double kTwoThreads = 0.5;
#else
inline constexpr double kTwoThreads = 0.05;
#endif

/// Sizes and dtypes of one call, and the memory of its tensors. The CUDA backend takes bfloat16 and
/// widths that are multiples of 8.
class Workbench {
 public:
  Workbench(const Target& target_, std::uint64_t seed, Optionals optionals)
      : target(target_), random(seed), optionals_(optionals) {
    const bool cuda = target.device.type == DeviceType::kCuda;
    T = random.integer(5, 12);
    E = random.integer(3, 6);
    K = random.integer(2, 3);
    d = cuda ? 8 * random.integer(1, 4) : random.integer(3, 14);
    n = cuda ? 8 * random.integer(1, 4) : random.integer(3, 14);
    dtype = cuda || random.chance(0.5) ? DType::kBFloat16 : DType::kFloat32;
    num_threads = cuda ? 0 : random.chance(kTwoThreads) ? 2 : 1;
  }

  /// Whether to have a tensor that may be left out.
  bool present() {
    return optionals_ == Optionals::kAll || (optionals_ == Optionals::kSome && random.chance(0.5));
  }
  DType float_dtype() { return random.chance(0.5) ? DType::kFloat32 : DType::kBFloat16; }
  DType id_dtype() { return random.chance(0.5) ? DType::kInt32 : DType::kInt64; }

  /// Normal values that bfloat16 holds exactly, so that converting them changes nothing.
  TensorView floats(DType type, std::vector<std::int64_t> shape, double scale, double mean = 0.0) {
    const auto tensor = take(type, std::move(shape));
    std::vector<double> values(static_cast<std::size_t>(tensor->numel()));
    for (double& value : values) {
      value = bfloat16(static_cast<float>(mean + scale * random.normal()));
    }
    tensor->fill(values);
    return tensor->view();
  }
  TensorView ids(DType type, std::vector<std::int64_t> shape,
                 const std::vector<std::int64_t>& values) {
    const auto tensor = take(type, std::move(shape));
    tensor->fill_ids(values);
    return tensor->view();
  }
  /// An output: poison.
  TensorView blank(DType type, std::vector<std::int64_t> shape) {
    return take(type, std::move(shape))->view();
  }
  TensorView bytes(std::size_t count) {
    return blank(DType::kUInt8, {static_cast<std::int64_t>(count)});
  }

  /// K different experts for each token; now and then a dropped slot.
  std::vector<std::int64_t> topk_ids(double drop_probability) {
    std::vector<std::int64_t> result;
    for (std::int64_t t = 0; t < T; ++t) {
      const std::int64_t first = random.integer(0, E - 1);
      for (std::int64_t k = 0; k < K; ++k) {
        result.push_back(random.chance(drop_probability) ? -1 : (first + k) % E);
      }
    }
    return result;
  }

  Context context() const { return target.context(num_threads); }
  /// What an operation has written becomes what the next one reads.
  void remember() {
    for (const auto& tensor : memory) tensor->remember();
  }

  const Target& target;
  Random random;
  std::int64_t T, d, n, E, K;
  DType dtype;
  int num_threads;
  std::vector<std::shared_ptr<Tensor>> memory;

 private:
  std::shared_ptr<Tensor> take(DType type, std::vector<std::int64_t> shape) {
    memory.push_back(std::make_shared<Tensor>(target, type, std::move(shape)));
    return memory.back();
  }

  Optionals optionals_;
};

// ------------------------------------------------------------------------------ options, made
// wrong

inline constexpr std::int64_t kTwo31 = std::int64_t{1} << 31;
inline constexpr std::int64_t kTwo62 = std::int64_t{1} << 62;
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// An enumerator: the first past `all` of them, and 255. `at(args)` gives the option.
template <class Args, class Enum, class At>
void spoil_enumerator(CallMaker<Args>& maker, const char* option, std::span<const Enum> all,
                      At at) {
  maker.each(option, Expected::kRefused, {static_cast<int>(all.size()), 255},
             [at](Args& args, int value) {
               auto& enumerator = at(args);
               enumerator = static_cast<std::remove_reference_t<decltype(enumerator)>>(value);
             });
}

/// A count from 1 to at most `most`.
template <class Args, class At>
void spoil_count(CallMaker<Args>& maker, const char* option, std::int64_t most, At at) {
  maker.each(option, Expected::kRefused,
             {std::int64_t{0}, std::int64_t{-1}, most + 1, kTwo31, kTwo62,
              std::numeric_limits<std::int64_t>::min()},
             [at](Args& args, std::int64_t value) { at(args) = value; });
}

template <class Args, class At>
void spoil_factor(CallMaker<Args>& maker, const char* option, At at) {
  const auto assign = [at](Args& args, float value) { at(args) = value; };
  maker.each(option, Expected::kRefused, {kNaN, kInfinity, -kInfinity}, assign);
  maker.each(option, Expected::kEither, {-1.5f, 0.0f}, assign);
}

template <class Args>
void spoil_workspace_limit(CallMaker<Args>& maker) {
  using Size = std::size_t;
  const auto assign = [](Args& args, Size value) { args.workspace_limit = value; };
  maker.each("workspace_limit", Expected::kRefused, {Size{0}, Size{1}}, assign);
  maker.each("workspace_limit", Expected::kSameResults,
             {Size{1} << 31, std::numeric_limits<Size>::max()}, assign);
}

/// The step of a backward: one that is none, and, as it has other tensors, any other.
template <class Args>
void spoil_step(CallMaker<Args>& maker) {
  maker.each("step", Expected::kRefused, {5, 255},
             [](Args& args, int value) { args.step = static_cast<BackwardStep>(value); });
}

/// What the steps of a backward hand on, for the arguments of either kind.
template <class Args>
void hand_on(Workbench& bench, Args& args, const MoEShape& shape) {
  args.grad_h = bench.blank(bench.dtype, {shape.row_capacity(), shape.h_columns()});
  args.scaled_a = bench.blank(bench.dtype, {shape.row_capacity(), shape.intermediate_size});
  const std::size_t bytes = moe_row_lists_bytes(bench.context(), shape);
  if (bytes > 0) args.row_lists = bench.bytes(bytes);
}

/// at(args) is the ExpertOptions.
template <class Args, class At>
void spoil_expert_options(CallMaker<Args>& maker, At at) {
  spoil_enumerator(maker, "activation", all_activations(),
                   [at](Args& a) -> auto& { return at(a).activation; });
  spoil_enumerator(maker, "gate_up_layout", all_gate_up_layouts(),
                   [at](Args& a) -> auto& { return at(a).gate_up_layout; });
  const auto clamped = [at](Args& args, float limit) {
    at(args).activation = Activation::kSwiGLUClamped;
    at(args).limit = limit;
  };
  maker.each("limit", Expected::kRefused, {kNaN, 0.0f, -1.0f, -kInfinity}, clamped);
  maker.each("limit", Expected::kEither, {kInfinity}, clamped);
  const auto bounded = [at](Args& args, std::int64_t value) { at(args).max_rows = value; };
  maker.each("max_rows", Expected::kRefused,
             {std::int64_t{-1}, std::numeric_limits<std::int64_t>::min()}, bounded);
  maker.each("max_rows", Expected::kEither, {std::int64_t{0}, std::int64_t{1}, kTwo31, kTwo62},
             bounded);
}

/// at(args) is the RouterOptions.
template <class Args, class At>
void spoil_router_options(CallMaker<Args>& maker, std::int64_t num_experts, At at) {
  spoil_enumerator(maker, "scoring", all_scorings(),
                   [at](Args& a) -> auto& { return at(a).scoring; });
  spoil_count(maker, "top_k", num_experts, [at](Args& a) -> auto& { return at(a).top_k; });
  spoil_count(maker, "num_groups", num_experts,
              [at](Args& a) -> auto& { return at(a).num_groups; });
  spoil_count(maker, "top_groups", num_experts,
              [at](Args& a) -> auto& { return at(a).top_groups; });
  spoil_factor(maker, "scale", [at](Args& a) -> auto& { return at(a).scale; });
  maker.add("renormalize", "false with topk_softmax", Expected::kRefused, [at](Context&, Args& a) {
    at(a) = RouterOptions();
    at(a).scoring = Scoring::kTopKSoftmax;
    at(a).renormalize = false;
  });
}

/// at(args) is the RoundingOptions.
template <class Args, class At>
void spoil_rounding_options(CallMaker<Args>& maker, std::int64_t num_tokens, At at) {
  spoil_enumerator(maker, "policy", all_rounding_policies(),
                   [at](Args& a) -> auto& { return at(a).policy; });
  spoil_count(maker, "tile", num_tokens, [at](Args& a) -> auto& { return at(a).tile; });
}

/// A router over the bench's experts; with a selection bias where the call may have one.
inline RouterOptions router_options(Workbench& bench) {
  RouterOptions options;
  options.top_k = bench.K;
  options.scale = 1.25f;
  if (bench.present()) {
    options.scoring = Scoring::kSigmoidTopK;
    options.selection_bias = bench.floats(DType::kFloat32, {bench.E}, 0.2);
    if (bench.E % 2 == 0 && bench.E / 2 >= bench.K) options.num_groups = 2;
  } else {
    options.scoring = bench.random.pick<Scoring>({Scoring::kTopKSoftmax, Scoring::kSoftmaxTopK});
  }
  return options;
}

/// A seed tensor where the call may have one; without it the seed is 0.
inline RoundingOptions rounding_options(Workbench& bench) {
  RoundingOptions options;
  // So small that some expert keeps rows, whichever way they are rounded.
  options.tile = bench.random.integer(2, (bench.T * bench.K + bench.E - 1) / bench.E);
  options.policy = bench.random.pick(all_rounding_policies());
  if (bench.present()) options.seed_tensor = bench.ids(DType::kInt64, {1}, {0});
  return options;
}

}  // namespace sonicmoe::rig
