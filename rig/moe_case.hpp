// One case of the expert layer: every choice a call can make, and the inputs that follow from it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "oracle/experts.hpp"
#include "rig/tensor.hpp"
#include "sonicmoe/moe.hpp"

namespace sonicmoe::rig {

enum class Numbers : std::uint8_t {
  kRealistic,  ///< normal activations, weights scaled by their fan-in, weights of pairs in (0, 1)
  kIntegers,   ///< so small that every stored intermediate is exact in bfloat16
  kLarge,      ///< as realistic, but quick to make (Tensor::fill_random): for contiguous tensors of
               ///< gigabytes whose rows are all used
};

enum class Load : std::uint8_t {
  kUniform,
  kOneExpert,  ///< one expert takes all rows
  kSomeEmpty,  ///< only every third expert has rows
};

struct MoEInputs;

struct MoECase {
  std::int64_t num_tokens = 13;         ///< T (form B: follows from num_pairs)
  std::int64_t hidden_size = 24;        ///< d
  std::int64_t intermediate_size = 20;  ///< n
  std::int64_t num_experts = 5;         ///< E
  std::int64_t top_k = 2;               ///< K, form A
  std::int64_t num_pairs = 29;          ///< P, forms B and C
  std::int64_t tail_rows = 0;           ///< form B: rows past the last end
  MoEShape::Form form = MoEShape::Form::kTopK;
  Activation activation = Activation::kSwiGLU;
  GateUpLayout gate_up_layout = GateUpLayout::kConcatenated;
  float limit = 0.75f;  ///< low enough that swiglu_clamped does clamp
  bool deterministic = true;
  DType dtype = DType::kFloat32;
  DType id_dtype = DType::kInt32;
  DType routing_weight_dtype = DType::kFloat32;
  bool biases = true;
  bool row_weights = true;                    ///< form B: false leaves them out
  Strides x_strides = Strides::kContiguous;   ///< of x, out, grad_out and grad_x
  Strides w1_strides = Strides::kContiguous;  ///< of w1 and grad_w1
  Strides w2_strides = Strides::kContiguous;  ///< of w2 and grad_w2
  Load load = Load::kUniform;
  double drop_probability = 0.0;  ///< of a slot or pair, forms A and C
  std::int64_t first_expert = 0;  ///< forms A and C
  std::optional<std::int64_t> max_rows;
  bool zero_absent_tokens = true;
  Numbers values = Numbers::kRealistic;
  std::uint64_t seed = 1;
  /// Unless empty, called last on all inputs of the case, on the target and on the host alike, to
  /// overwrite them with a test's own; `description` there is the fitted case.
  std::function<void(MoEInputs&)> fill;

  std::int64_t h_columns() const { return gate_factor(activation) * intermediate_size; }
  /// Rows of x and of the output.
  std::int64_t tokens() const { return form == MoEShape::Form::kSorted ? num_pairs : num_tokens; }
  /// P of the header.
  std::int64_t pairs() const {
    return form == MoEShape::Form::kTopK ? num_tokens * top_k : num_pairs;
  }
  /// C of the header.
  std::int64_t row_capacity() const { return std::min(pairs(), max_rows.value_or(pairs())); }
  ExpertOptions options() const {
    return {activation, gate_up_layout, limit, deterministic, max_rows, zero_absent_tokens};
  }
  /// One line that names every choice.
  std::string describe() const;
};

/// The case, changed as little as the target's backend needs: the CUDA backend takes bfloat16,
/// widths that are multiples of 8 and rows that start at multiples of 16 bytes.
MoECase fitted(const Target& target, MoECase test_case);

/// The inputs of a case on a target: a pure function of the case. Before fill, rows of x and
/// grad_out that no pair uses hold NaN.
struct MoEInputs {
  MoEInputs(const Target& target, const MoECase& test_case);

  ExpertWeights weights() const;
  Routing routing() const;
  MoEShape shape() const;
  /// Tokens with a row, ascending.
  const std::vector<std::int64_t>& used_tokens() const { return used_tokens_; }
  /// Rows that max_rows leaves no room for.
  std::int64_t rows_beyond() const { return rows_beyond_; }
  /// Only for inputs on the host.
  oracle::Problem problem() const;
  /// "NAME: what happened" for every input a call changed.
  std::vector<std::string> violations() const;

  MoECase description;
  Tensor x, grad_out, w1, b1, w2, b2;
  Tensor topk_ids, offsets, token_ids, expert_ids, routing_weights;

 private:
  void fill_routing(const Target& target);
  void fill_values();
  void keep_rows(std::vector<oracle::Row> rows);
  std::vector<std::int64_t> used_tokens_;
  std::int64_t rows_beyond_ = 0;
};

}  // namespace sonicmoe::rig
