// What the backward operators return.
#pragma once

#include <array>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "convert.hpp"

namespace sonicmoe_torch {

using Needs = std::vector<bool>;
using Tensors = std::vector<Tensor>;

/// The N elements of a list, to be given names; throws where there are more or fewer.
template <std::size_t N, class T>
std::array<T, N> exactly(const Views& views, const char* argument, const std::vector<T>& list) {
  if (list.size() != N) {
    throw sonicmoe::Error(views.operation(), argument, std::to_string(N) + " elements",
                          std::to_string(list.size()));
  }
  return [&]<std::size_t... I>(std::index_sequence<I...>) {
    return std::array<T, N>{list[I]...};
  }(std::make_index_sequence<N>());
}

/// A result and where the library writes it. Not needed: an empty tensor and an absent view.
struct Gradient {
  Tensor tensor;
  sonicmoe::TensorView view;
};

/// Makes the gradients of one backward operator, in the order of its `needs`. Those that are needed
/// are allocated; or, where the caller hands over `main_grads` (one float32 buffer for each
/// parameter that needs a gradient, in order), added to the buffer, and the result stays empty.
class Gradients {
 public:
  /// `like` is any tensor of the call; `inputs` of the `count` needs, the first, are no parameters.
  /// Throws unless there are as many needs and as many buffers as needed parameters, or none.
  Gradients(const Views& views, const Tensor& like, const Needs& needs, std::size_t count,
            std::span<const Tensor> main_grads = {}, std::size_t inputs = 1);

  bool accumulate() const noexcept { return !main_grads_.empty(); }

  /// [..., d], contiguous, of the dtype of input: no parameter, so never in a buffer.
  Gradient of_input(const char* name, const Tensor& input);
  /// The layout of the weight is kept.
  Gradient of_weight(const char* name, const OptionalTensor& weight);
  Gradient of_bias(const char* name, const OptionalTensor& bias);
  /// float32 whatever the weights are; no parameter either.
  Gradient of_routing_weights(const char* name, const OptionalTensor& weights);

 private:
  /// Whether the next one is needed; throws where it is needed `of` an absent tensor.
  bool next(const char* name, const OptionalTensor& of);
  Gradient fresh(const char* name, const Tensor& tensor) const;
  Gradient in_buffer(const char* name);

  const Views& views_;
  const Tensor& like_;
  const Needs& needs_;
  const std::span<const Tensor> main_grads_;
  std::size_t next_need_ = 0, next_buffer_ = 0;
};

/// What the operators of a backward in steps hand on (sonicmoe::BackwardStep).
struct HandedOn {
  Tensor grad_h;     ///< [C, g*n], dtype of x
  Tensor scaled_a;   ///< [C, n], dtype of x
  Tensor row_lists;  ///< bytes
};
HandedOn new_handed_on(const Views& views, const Call& call, const Tensor& x,
                       const sonicmoe::MoEShape& shape);

}  // namespace sonicmoe_torch
