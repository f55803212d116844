// A layer to time: the experts with ready routing, or the whole layer with its router.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <stdexcept>

#include "cli/experts.hpp"
#include "cli/options.hpp"
#include "sonicmoe/moe_layer.hpp"

namespace sonicmoe::cli {

struct LayerOptions {
  Activation activation = Activation::kSwiGLU;
  bool with_router = false;
  std::optional<std::size_t> workspace_limit;
};

/// The results that were about to be timed are wrong.
class CheckFailed : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class BenchLayer {
 public:
  BenchLayer(const Context& context, const LayerShape& shape, DType dtype,
             const LayerOptions& options, Random& random);

  void forward(const Context& context);
  void backward(const Context& context);

  /// After forward and backward: three tokens and some hidden units of one expert against the
  /// float64 reference. Forward and dX of a token depend on that token alone, a unit's rows of dW
  /// on the unit and its expert's rows alone, so the parts are exact checks at a small share of the
  /// cost. dWr of two experts is the float64 sum over their tokens, from the dS that the experts'
  /// backward (itself checked) hands out. Throws CheckFailed. Overwrites the gradients.
  void check(const Context& context);

  const MoEShape& shape() const noexcept { return shape_; }
  /// H and routing (this library's metadata and the caller's ids and weights).
  std::size_t kept_bytes() const;
  std::size_t peak_forward_bytes() const;
  std::size_t peak_backward_bytes() const;

  /// Bytes of all buffers of one BenchLayer.
  static std::size_t total_bytes(const Context& context, const LayerShape& shape, DType dtype,
                                 const LayerOptions& options);
  /// Bytes of host memory that the float64 reference takes beside them: for check(), and for every
  /// call where it is the backend.
  static double reference_bytes(const Context& context, const LayerShape& shape,
                                const LayerOptions& options, bool with_check);
  /// How many BenchLayers to take turns with, so that none finds its data in the last-level cache.
  static std::size_t sets_to_rotate(Device device, std::size_t bytes_of_one);

 private:
  void layer_forward(const Context& context);
  void layer_backward(const Context& context);

  LayerOptions options_;
  MoELayerOptions layer_options_;
  ExpertsInputs inputs_;
  MoEShape shape_;
  ExpertsRun run_;  // its buffers serve the whole layer too
  // The router's part, with_router only.
  Tensor router_weight_, logits_, rows_per_expert_, grad_router_weight_;
  Tensor layer_forward_workspace_, layer_backward_workspace_;
};

}  // namespace sonicmoe::cli
