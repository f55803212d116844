// One training step of one Mixture-of-Experts layer: route, forward, loss, backward, SGD, and the
// loss again. The layer learns to reproduce its input; loss = mean((O - X)^2) / 2.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "sonicmoe/sonicmoe.hpp"

namespace {

using sonicmoe::DType;
using sonicmoe::TensorView;

constexpr std::int64_t kTokens = 64, kWidth = 32, kExpertWidth = 16, kExperts = 8, kTopK = 2;

std::vector<float> random_values(std::mt19937& generator, std::int64_t count, float deviation) {
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

// Scratch aligned as the library asks for (64 bytes).
class Workspace {
 public:
  explicit Workspace(std::size_t bytes) : blocks_(bytes / sizeof(Block) + 1), bytes_(bytes) {}
  TensorView view() {
    return TensorView(blocks_.data(), DType::kUInt8, {static_cast<std::int64_t>(bytes_)});
  }

 private:
  struct alignas(64) Block {
    std::byte bytes[64];
  };
  std::vector<Block> blocks_;
  std::size_t bytes_;
};

struct Layer {
  std::vector<float> x, w1, w2, logits;
  std::vector<std::int32_t> ids = std::vector<std::int32_t>(kTokens * kTopK);
  std::vector<float> weights = std::vector<float>(kTokens * kTopK);
  std::vector<float> out = std::vector<float>(kTokens * kWidth);
  std::vector<float> h = std::vector<float>(kTokens * kTopK * 2 * kExpertWidth);

  TensorView x_view() { return {x.data(), DType::kFloat32, {kTokens, kWidth}}; }
  TensorView h_view() { return {h.data(), DType::kFloat32, {kTokens * kTopK, 2 * kExpertWidth}}; }
  sonicmoe::ExpertWeights parameters() {
    return {TensorView(w1.data(), DType::kFloat32, {kExperts, 2 * kExpertWidth, kWidth}),
            {},
            TensorView(w2.data(), DType::kFloat32, {kExperts, kWidth, kExpertWidth}),
            {}};
  }
  sonicmoe::Routing routing() {
    return sonicmoe::TopKRouting{TensorView(ids.data(), DType::kInt32, {kTokens, kTopK}),
                                 TensorView(weights.data(), DType::kFloat32, {kTokens, kTopK})};
  }
  double loss() const {
    double sum = 0.0;
    for (std::size_t i = 0; i < out.size(); ++i) {
      const double error = static_cast<double>(out[i]) - static_cast<double>(x[i]);
      sum += error * error;
    }
    return sum / (2.0 * static_cast<double>(out.size()));
  }
};

void forward(const sonicmoe::Context& context, Layer& layer, Workspace& metadata) {
  const auto shape = sonicmoe::moe_shape({}, layer.x_view(), layer.parameters(), layer.routing());
  Workspace workspace(sonicmoe::moe_forward_workspace(context, shape).bytes);
  sonicmoe::MoEForwardArgs args;
  args.x = layer.x_view();
  args.weights = layer.parameters();
  args.routing = layer.routing();
  args.out = TensorView(layer.out.data(), DType::kFloat32, {kTokens, kWidth});
  args.h = layer.h_view();
  args.metadata = metadata.view();
  args.workspace = workspace.view();
  sonicmoe::moe_forward(context, args);
}

void backward_and_step(const sonicmoe::Context& context, Layer& layer, Workspace& metadata,
                       float learning_rate) {
  const auto shape = sonicmoe::moe_shape({}, layer.x_view(), layer.parameters(), layer.routing());
  Workspace workspace(sonicmoe::moe_backward_workspace(context, shape).bytes);
  std::vector<float> grad_out(layer.out.size());
  for (std::size_t i = 0; i < grad_out.size(); ++i) {
    grad_out[i] = (layer.out[i] - layer.x[i]) / static_cast<float>(grad_out.size());
  }
  std::vector<float> grad_w1(layer.w1.size()), grad_w2(layer.w2.size());
  sonicmoe::MoEBackwardArgs args;
  args.grad_out = TensorView(grad_out.data(), DType::kFloat32, {kTokens, kWidth});
  args.x = layer.x_view();
  args.weights = layer.parameters();
  args.routing = layer.routing();
  args.h = layer.h_view();
  args.metadata = metadata.view();
  args.grad_w1 = TensorView(grad_w1.data(), DType::kFloat32, {kExperts, 2 * kExpertWidth, kWidth});
  args.grad_w2 = TensorView(grad_w2.data(), DType::kFloat32, {kExperts, kWidth, kExpertWidth});
  args.workspace = workspace.view();
  sonicmoe::moe_backward(context, args);
  for (std::size_t i = 0; i < grad_w1.size(); ++i) layer.w1[i] -= learning_rate * grad_w1[i];
  for (std::size_t i = 0; i < grad_w2.size(); ++i) layer.w2[i] -= learning_rate * grad_w2[i];
}

}  // namespace

int main() {
  try {
    std::mt19937 generator(0);
    Layer layer;
    layer.x = random_values(generator, kTokens * kWidth, 1.0f);
    layer.w1 = random_values(generator, kExperts * 2 * kExpertWidth * kWidth, 0.18f);
    layer.w2 = random_values(generator, kExperts * kWidth * kExpertWidth, 0.25f);
    layer.logits = random_values(generator, kTokens * kExperts, 1.0f);

    const sonicmoe::Context context;
    sonicmoe::RouteForwardArgs route;
    route.options.top_k = kTopK;
    route.options.scoring = sonicmoe::Scoring::kTopKSoftmax;
    route.logits = TensorView(layer.logits.data(), DType::kFloat32, {kTokens, kExperts});
    route.topk_ids = TensorView(layer.ids.data(), DType::kInt32, {kTokens, kTopK});
    route.topk_weights = TensorView(layer.weights.data(), DType::kFloat32, {kTokens, kTopK});
    sonicmoe::route_forward(context, route);

    Workspace metadata(sonicmoe::moe_metadata_bytes(
        sonicmoe::moe_shape({}, layer.x_view(), layer.parameters(), layer.routing())));
    forward(context, layer, metadata);
    const double before = layer.loss();
    backward_and_step(context, layer, metadata, /*learning_rate=*/20.0f);
    forward(context, layer, metadata);
    const double after = layer.loss();
    std::printf("sonicmoe %s: loss %.6f before the step, %.6f after\n",
                std::string(sonicmoe::version()).c_str(), before, after);
    return after < before ? 0 : 1;
  } catch (const sonicmoe::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
