// M6: the expert layer through the public API, moe_forward and moe_backward with ready-made top-K
// routing: row lists, six GEMMs, two aggregations. No router. Links the library.
#include <numeric>

#include "harness.cuh"
#include "sonicmoe/sonicmoe.hpp"

using namespace experiment;
using namespace sonicmoe;

namespace {

struct Case {
  const char* name;
  int64_t T, d, n, E, K;
};

// K distinct experts per token, uniformly at random.
std::vector<int> random_routing(const Case& c) {
  std::vector<int> ids(size_t(c.T * c.K));
  for (int64_t t = 0; t < c.T; ++t) {
    for (int64_t k = 0; k < c.K; ++k) {
      for (uint32_t attempt = 0;; ++attempt) {
        const int e = int(hash(attempt, uint64_t(t * c.K + k)) % uint32_t(c.E));
        const int* begin = &ids[size_t(t * c.K)];
        if (std::find(begin, begin + k, e) != begin + k) continue;
        ids[size_t(t * c.K + k)] = e;
        break;
      }
    }
  }
  return ids;
}

void time_case(const Case& c) {
  const size_t P = size_t(c.T * c.K);
  DeviceBuffer<bf16> x(size_t(c.T * c.d)), grad_out(x.size()), out(x.size()), grad_x(x.size());
  DeviceBuffer<bf16> w1(size_t(c.E * 2 * c.n * c.d)), w2(size_t(c.E * c.n * c.d));
  DeviceBuffer<bf16> grad_w1(w1.size()), grad_w2(w2.size()), h(P * size_t(2 * c.n));
  DeviceBuffer<int> ids(random_routing(c));
  DeviceBuffer<float> weights(std::vector<float>(P, 0.125f)), grad_weights(P);
  for (auto* b : {&x, &grad_out, &w1, &w2}) fill_random(*b, uint32_t(b->size() % 97 + 1));

  Context context;
  context.device = {DeviceType::kCuda, 0};
  constexpr DType bfloat = DType::kBFloat16;
  const TopKRouting routing{{ids.data(), DType::kInt32, {c.T, c.K}},
                            {weights.data(), DType::kFloat32, {c.T, c.K}}};
  const ExpertWeights experts{
      {w1.data(), bfloat, {c.E, 2 * c.n, c.d}}, {}, {w2.data(), bfloat, {c.E, c.d, c.n}}, {}};
  const ConstTensorView xv(x.data(), bfloat, {c.T, c.d});
  const MoEShape shape = moe_shape({}, xv, experts, routing);
  const WorkspacePlan plans[] = {moe_forward_workspace(context, shape),
                                 moe_backward_workspace(context, shape)};
  DeviceBuffer<uint8_t> workspace(std::max(plans[0].bytes, plans[1].bytes));
  DeviceBuffer<uint8_t> metadata(moe_metadata_bytes(shape));
  const TensorView hv(h.data(), bfloat, {int64_t(P), 2 * c.n});
  const TensorView mv(metadata.data(), DType::kUInt8, {int64_t(metadata.size())});
  const TensorView wv(workspace.data(), DType::kUInt8, {int64_t(workspace.size())});

  MoEForwardArgs forward;
  forward.x = xv;
  forward.weights = experts;
  forward.routing = routing;
  forward.out = TensorView(out.data(), bfloat, {c.T, c.d});
  forward.h = hv;
  forward.metadata = mv;
  forward.workspace = wv;
  MoEBackwardArgs backward;
  backward.grad_out = ConstTensorView(grad_out.data(), bfloat, {c.T, c.d});
  backward.x = xv;
  backward.weights = experts;
  backward.routing = routing;
  backward.h = hv;
  backward.metadata = mv;
  backward.grad_x = TensorView(grad_x.data(), bfloat, {c.T, c.d});
  backward.grad_w1 = TensorView(grad_w1.data(), bfloat, {c.E, 2 * c.n, c.d});
  backward.grad_w2 = TensorView(grad_w2.data(), bfloat, {c.E, c.d, c.n});
  backward.grad_routing_weights = TensorView(grad_weights.data(), DType::kFloat32, {c.T, c.K});
  backward.workspace = wv;

  // The same bits from repeated runs: the result of the first is compared with that of the last.
  moe_forward(context, forward);
  moe_backward(context, backward);
  CHECK_CUDA(cudaDeviceSynchronize());
  const std::vector<bf16> first_out = out.to_host(), first_dx = grad_x.to_host();
  const std::vector<bf16> first_w1 = grad_w1.to_host();
  const std::vector<Timing> timings = time_interleaved(
      {[&] { moe_forward(context, forward); }, [&] { moe_backward(context, backward); }}, 15);
  auto equal = [](const std::vector<bf16>& a, const std::vector<bf16>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(bf16)) == 0;
  };
  expect(equal(first_out, out.to_host()) && equal(first_dx, grad_x.to_host()) &&
             equal(first_w1, grad_w1.to_host()),
         format("m6 %s: equal bits over 17 runs", c.name));
  const double f = 2.0 * double(P) * double(c.n) * double(c.d);
  Row("m6_layer", "forward")
      .text("shape", c.name)
      .timing(timings[0])
      .number("tflops", 3 * f / timings[0].median * 1e-9)
      .number("workspace_mib", double(plans[0].bytes) / 1048576)
      .number("kept_mib", double(h.bytes() + metadata.bytes()) / 1048576)
      .print();
  Row("m6_layer", "backward")
      .text("shape", c.name)
      .timing(timings[1])
      .number("tflops", 6 * f / timings[1].median * 1e-9)
      .number("workspace_mib", double(plans[1].bytes) / 1048576)
      .print();
}

}  // namespace

int main() {
  const Case cases[] = {
      {"1.4B-n256", 40960, 768, 256, 128, 8},     {"1.4B-n512", 40960, 768, 512, 64, 4},
      {"1.4B-n1024", 40960, 768, 1024, 32, 2},    {"7B-n256", 24576, 1536, 256, 128, 8},
      {"7B-n512", 24576, 1536, 512, 64, 4},       {"7B-n1024", 24576, 1536, 1024, 32, 2},
      {"30B-n256", 32768, 4096, 256, 256, 16},    {"30B-n512", 32768, 4096, 512, 128, 8},
      {"30B-n1024", 32768, 4096, 1024, 64, 4},    {"120B-n512", 32768, 4096, 512, 256, 16},
      {"120B-n1024", 32768, 4096, 1024, 128, 8},  {"120B-n2048", 32768, 4096, 2048, 64, 4},
      {"OLMoE", 32768, 2048, 1024, 64, 8},        {"Qwen3-Next", 32768, 2048, 512, 512, 10},
      {"Kimi-Linear", 32768, 2304, 1024, 256, 8}, {"gpt-oss-20b", 32768, 2880, 2880, 32, 4},
  };
  for (const Case& c : cases) time_case(c);
  return finish();
}
