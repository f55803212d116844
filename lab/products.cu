// The products of the layer (src/cuda/products.hpp) one by one, beside cuBLAS's batched products of
// the same FLOPs. tests/ops/specs_test.cpp checks them; here they are timed.
//   products [SHAPE...]        all in turn, at shapes of bench/problems.json
//   products power [SHAPE...]  each alone under lasting load, with power, clock and energy
#include <numeric>

#include "cublas.cuh"
#include "cuda/device.hpp"
#include "cuda/products.hpp"
#include "power.cuh"
#include "problems.hpp"

using namespace experiment;
using namespace sonicmoe;
namespace cuda = sonicmoe::cuda;

namespace {

struct Timed {
  std::string name;
  double flops;
  std::function<void()> launch;
};

// Rows per expert within an eighth of the mean, each expert's tokens ascending, as routing gives.
struct Lists {
  explicit Lists(const LayerShape& s) {
    const int mean = int(int64_t{s.T} * s.K / s.E);
    for (int e = 0; e < s.E; ++e) {
      const int first = int(token.size()),
                count = mean + int(hash(7, e) % (mean / 4 + 1)) - mean / 8;
      for (int i = 0; i < count; ++i) token.push_back(int(hash(11 + e, i) % s.T));
      std::sort(token.begin() + first, token.end());
      for (int t = 0; t < count; t += cuda::kTileRows) {
        tiles.push_back({first + t, count - t, e, t / cuda::kTileRows});
      }
      groups.push_back({first, count, e, 0});
    }
    std::stable_sort(groups.begin(), groups.end(),
                     [](const int4& p, const int4& q) { return p.y > q.y; });
  }
  std::vector<int> token;
  std::vector<int4> tiles, groups;
};

TensorView view(const DeviceBuffer<bf16>& buffer, int64_t E, int64_t rows, int64_t columns) {
  return TensorView(buffer.data(), DType::kBFloat16, {E, rows, columns});
}

// Operands of all products at one shape: H of deviation 1, as in a trained layer. Which bits toggle
// is part of the power.
class Layer {
 public:
  explicit Layer(const LayerShape& shape)
      : s(shape),
        lists(shape),
        R(lists.token.size()),
        x(size_t(s.T) * s.d),
        grad_out(x.size()),
        w1(size_t(s.E) * 2 * s.n * s.d),
        w2(size_t(s.E) * s.n * s.d),
        h(R * 2 * s.n),
        a(R * s.n),
        rows(R * s.d),
        grad_h(h.size()),
        scaled_a(a.size()),
        grad_w1(w1.size()),
        grad_w2(w2.size()),
        partial(R * ((s.n + cuda::kLeastPartialColumns - 1) / cuda::kLeastPartialColumns)),
        weight(std::vector<float>(R, 0.125f)),
        token(lists.token),
        tiles(lists.tiles),
        groups(lists.groups),
        num_tiles(std::vector<int>{int(lists.tiles.size())}),
        claims(std::vector<std::uint32_t>{0, 0}) {
    fill_random(x, 1);
    fill_random(grad_out, 2);
    fill_random(w1, 3, Fill::kNormal, 1 / std::sqrt(float(s.d)));
    fill_random(w2, 4, Fill::kNormal, 1 / std::sqrt(float(s.n)));
    call.num_tokens = s.T;
    call.num_rows = int64_t(R);
    call.rows = {token.data(), tiles.data(), num_tiles.data(), groups.data(), claims.data()};
  }

  // In the order in which one reads what another wrote.
  std::vector<Timed> products() {
    const cuda::Matrix xs{x.data(), s.d}, dout{grad_out.data(), s.d}, out{rows.data(), s.d};
    const cuda::HiddenFunction swiglu{Activation::kSwiGLU, GateUpLayout::kConcatenated};
    const TensorView w1v = view(w1, s.E, 2 * s.n, s.d), w2v = view(w2, s.E, s.d, s.n);
    cuda::UpArgs up{xs, w1v, {}, swiglu, h.data(), a.data()};
    cuda::RowsArgs down{a.data(), w2v, 2};
    cuda::GradHArgs hidden{dout,          w2v,           swiglu,          h.data(),
                           weight.data(), grad_h.data(), scaled_a.data(), partial.data()};
    cuda::RowsArgs grad_x{grad_h.data(), w1v, 1};
    for (cuda::RowsArgs* args : {&down, &grad_x}) {
      args->num_columns = s.d;
      args->out = out;
    }
    const cuda::WeightGradientArgs dw2{dout, scaled_a.data(), view(grad_w2, s.E, s.d, s.n), 1};
    const cuda::WeightGradientArgs dw1{xs, grad_h.data(), view(grad_w1, s.E, 2 * s.n, s.d), 2};
    const double f = 2.0 * double(R) * s.n * s.d;
    return {timed("up", 2 * f, up),      timed("down", f, down), timed("dH", f, hidden),
            timed("dX~", 2 * f, grad_x), timed("dW2", f, dw2),   timed("dW1", 2 * f, dw1)};
  }

  // Of the same FLOPs, on the same memory: what it holds does not matter to them.
  std::vector<Timed> dense(const Cublas& cublas) {
    if (!cublas.available()) return {};
    const int m = int(R) / s.E;
    return {
        timed(cublas, {"cuBLAS as up", s.E, m, 2 * s.n, s.d}, rows, w1, h),
        timed(cublas, {"cuBLAS as dX~", s.E, m, s.d, 2 * s.n, false, true}, grad_h, w1, rows),
        timed(cublas, {"cuBLAS as dW1", s.E, 2 * s.n, s.d, m, true, true}, grad_h, rows, grad_w1)};
  }

 private:
  template <class Args>
  Timed timed(const char* name, double flops, const Args& args) {
    const cuda::Products& family = cuda::products_of(0);
    const cuda::Reason reason = family.reason_against(call, args);
    if (reason)
      expect(false, std::string(name) + ": " + reason->argument + ": expected " + reason->expected);
    return {name, flops, [this, &family, args] { family.run(call, args); }};
  }
  Timed timed(const Cublas& cublas, const BatchedProduct& p, const DeviceBuffer<bf16>& left,
              const DeviceBuffer<bf16>& right, const DeviceBuffer<bf16>& result) {
    return {p.name, p.flops(), [&cublas, p, &left, &right, &result] {
              cublas.multiply(p, left.data(), right.data(), result.data());
            }};
  }

  LayerShape s;
  Lists lists;
  size_t R;
  DeviceBuffer<bf16> x, grad_out, w1, w2, h, a, rows, grad_h, scaled_a, grad_w1, grad_w2;
  DeviceBuffer<float> partial, weight;
  DeviceBuffer<int> token;
  DeviceBuffer<int4> tiles, groups;
  DeviceBuffer<int> num_tiles;
  DeviceBuffer<std::uint32_t> claims;
  cuda::ProductCall call;
};

void time_all(const LayerShape& s, const std::vector<Timed>& all) {
  std::vector<std::function<void()>> launches;
  for (const Timed& one : all) launches.push_back(one.launch);
  const std::vector<Timing> timings = time_interleaved(launches, 9);
  for (size_t i = 0; i < all.size(); ++i) {
    Row("products", all[i].name)
        .text("shape", s.name)
        .timing(timings[i])
        .number("tflops", all[i].flops / timings[i].median * 1e-9)
        .print();
  }
}

void measure_power_of(const LayerShape& s, const std::vector<Timed>& all, const Nvml& nvml) {
  constexpr double kSettle = 1.5, kSeconds = 1.5;
  for (const Timed& one : all) one.launch();  // what the others read
  for (const Timed& one : all) {
    print_power("product_power", one.name, s.name,
                measure_power(nvml, one.launch, kSettle, kSeconds), one.flops);
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> names(argv + 1, argv + argc);
  const bool power = !names.empty() && names[0] == "power";
  if (power) names.erase(names.begin());
  if (names.empty()) names = {"7B-n256", "30B-n256", "30B-n1024", "Qwen3-Next"};
  const Cublas cublas;
  const Nvml nvml;
  if (power) expect(nvml.available(), "NVML is there");
  for (const std::string& name : names) {
    const auto found = std::find_if(std::begin(kLayerShapes), std::end(kLayerShapes),
                                    [&](const LayerShape& s) { return name == s.name; });
    if (!expect(found != std::end(kLayerShapes), name + " is in bench/problems.json")) continue;
    Layer layer(*found);
    std::vector<Timed> all = layer.products();
    for (Timed& one : layer.dense(cublas)) all.push_back(std::move(one));
    if (g_failures != 0) break;
    power ? measure_power_of(*found, all, nvml) : time_all(*found, all);
  }
  return finish();
}
