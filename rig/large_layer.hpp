// A layer of any size, to be timed: the experts with ready routing, or the whole layer with its
// router. Made quickly, checked on parts.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "rig/layer_run.hpp"
#include "rig/moe_run.hpp"

namespace sonicmoe::rig {

class LargeLayer {
 public:
  /// Form A, contiguous, without biases: sizes, activation, dtype and seed of `sizes`. Errors:
  /// those of the workspace queries; std::bad_alloc.
  LargeLayer(const Context& context, MoECase sizes, bool with_router,
             std::optional<std::size_t> workspace_limit);

  void forward() { layer_ ? layer_->forward() : experts_->forward(); }
  void backward() { layer_ ? layer_->backward() : experts_->backward(); }
  /// After forward and backward: what is wrong (rig/spot_check.hpp), or nothing.
  std::vector<std::string> check() const;

  MoEShape shape() const { return layer_ ? layer_->shape : inputs_->shape(); }
  /// H and routing (this library's metadata and the caller's ids and weights).
  std::size_t kept_bytes() const;
  /// With the call's workspace and its output, or dX.
  std::size_t peak_forward_bytes() const;
  std::size_t peak_backward_bytes() const;

  /// Bytes of all buffers of one LargeLayer on its device.
  static std::size_t total_bytes(const Context& context, const MoEShape& shape, bool with_router,
                                 std::optional<std::size_t> workspace_limit);
  /// Bytes of host memory that float64 loops take beside them: for check(), and for every call
  /// where the reference is the backend.
  static double reference_bytes(const Context& context, const MoEShape& shape, bool with_check);

 private:
  Target target_;
  std::unique_ptr<MoEInputs> inputs_;    // without the router
  std::unique_ptr<ExpertsRun> experts_;  // over inputs_
  std::unique_ptr<LayerRun> layer_;      // with it
};

}  // namespace sonicmoe::rig
