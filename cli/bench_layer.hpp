// A layer to time: the experts with ready routing, or the whole layer with its router.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cli/layer_shape.hpp"
#include "rig/layer_run.hpp"
#include "rig/moe_run.hpp"

namespace sonicmoe::cli {

struct LayerOptions {
  Activation activation = Activation::kSwiGLU;
  bool with_router = false;
  std::optional<std::size_t> workspace_limit;
};

class BenchLayer {
 public:
  BenchLayer(const Context& context, const LayerShape& shape, DType dtype,
             const LayerOptions& options, std::uint64_t seed);

  void forward() { layer_ ? layer_->forward() : experts_->forward(); }
  void backward() { layer_ ? layer_->backward() : experts_->backward(); }
  /// After forward and backward: what is wrong (rig/spot_check.hpp), or nothing.
  std::vector<std::string> check() const;

  MoEShape shape() const { return layer_ ? layer_->shape : inputs_->shape(); }
  /// H and routing (this library's metadata and the caller's ids and weights).
  std::size_t kept_bytes() const;
  std::size_t peak_forward_bytes() const;
  std::size_t peak_backward_bytes() const;

  /// Bytes of all buffers of one BenchLayer.
  static std::size_t total_bytes(const Context& context, const LayerShape& shape, DType dtype,
                                 const LayerOptions& options);
  /// Bytes of host memory that float64 loops take beside them: for check(), and for every call
  /// where the reference is the backend.
  static double reference_bytes(const Context& context, const LayerShape& shape,
                                const LayerOptions& options, bool with_check);
  /// How many BenchLayers to take turns with, so that none finds its data in the last-level cache.
  static std::size_t sets_to_rotate(Device device, std::size_t bytes_of_one);

 private:
  rig::Target target_;
  std::unique_ptr<rig::MoEInputs> inputs_;    // without the router
  std::unique_ptr<rig::ExpertsRun> experts_;  // over inputs_
  std::unique_ptr<rig::LayerRun> layer_;      // with it
};

}  // namespace sonicmoe::cli
