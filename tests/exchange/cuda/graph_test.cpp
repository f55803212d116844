// Exchanges in CUDA graphs: captured once for each rank, replayed with other routing.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <stdexcept>

#include "rig/exchange_group.hpp"

namespace sonicmoe::rig {
namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

// One rank's forward and backward.
class Graph {
 public:
  Graph(ExchangeGroup& group, int rank)
      : stream_(static_cast<cudaStream_t>(group.rank(rank).stream)) {
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    group.forward(rank);
    group.backward(rank);
    check(cudaStreamEndCapture(stream_, &graph));
    check(cudaGraphInstantiate(&graph_, graph, 0));
    check(cudaGraphDestroy(graph));
    check(cudaGraphUpload(graph_, stream_));
  }
  ~Graph() { (void)cudaGraphExecDestroy(graph_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch() const { check(cudaGraphLaunch(graph_, stream_)); }

 private:
  cudaStream_t stream_;
  cudaGraphExec_t graph_ = nullptr;
};

TEST(ExchangeGraph, ReplaysWithOtherRoutingGiveTheSameBits) {
  for (const Target& target : targets()) {
    if (target.device.type != DeviceType::kCuda) continue;
    ExchangeCase c;
    c.layer.num_tokens = 300;
    c.layer.num_experts = 8;
    c.layer.top_k = 3;
    c.layer.hidden_size = 128;
    c.layer.intermediate_size = 64;
    c.layer.drop_probability = 0.0;
    c.layer = fitted(target, c.layer);
    c.tokens = spread_tokens(c.layer.num_tokens, 4);
    ExchangeGroup replayed(target, c), eager(target, c);
    eager.forward();  // every kernel is there before ranks wait for each other in a capture
    eager.backward();
    std::vector<std::unique_ptr<Graph>> graphs;
    for (int r = 0; r < 4; ++r) graphs.push_back(std::make_unique<Graph>(replayed, r));
    for (int i = 0; i < 10; ++i) {
      for (int r = 0; r < 4; ++r) {
        std::vector<std::int64_t> ids;
        for (std::int64_t slot = 0; slot < replayed.rank(r).topk_ids.numel(); ++slot) {
          ids.push_back((slot * (i + 1) + r) % (8 - i % 3));
        }
        replayed.rank(r).topk_ids.fill_ids(ids);
        eager.rank(r).topk_ids.fill_ids(ids);
      }
      for (const auto& graph : graphs) graph->launch();
      target.memory->synchronize();
      for (int r = 0; r < 4; ++r) replayed.rank(r).exchange->check();
      eager.forward();
      eager.backward();
      ASSERT_EQ(bitwise_difference(replayed.result(), eager.result()), "") << "replay " << i;
    }
    return;
  }
  GTEST_SKIP() << "no GPU";
}

}  // namespace
}  // namespace sonicmoe::rig
