// M5: the six grouped GEMMs of the layer (src/cuda/hopper), checked against fp64 sums of the same
// stored operands and timed one by one. Row lists are made on the host; no router, no aggregation.
// `m5_grouped_gemm power [case]`: each one alone under lasting load, with power, clock and energy,
// beside cuBLAS's batched product of the same FLOPs.
#include <numeric>

#include "cublas.cuh"
#include "cuda/hopper/epilogue/activation.cuh"
#include "cuda/hopper/products.hpp"
#include "power.cuh"

using namespace experiment;
using namespace sonicmoe;

namespace {

const cuda::Products& products = cuda::hopper::products();

struct Case {
  const char* name;
  int T, d, n, E, K;
  Activation activation = Activation::kSwiGLU;
  GateUpLayout layout = GateUpLayout::kConcatenated;
  bool transposed = false;  // weights and their gradients
  bool bias = false;
  bool float_gradients = false;  // float32, accumulated
  int skew = 0;                  // 0 uniform; 1 one expert takes all; 2 many empty; 3 edge counts
};

// A strided [E, rows, cols] tensor, contiguous or with the last two dimensions exchanged.
struct Weight {
  Weight(int experts, int rows, int cols, bool transposed)
      : data(size_t(experts) * rows * cols),
        experts(experts),
        rows(rows),
        cols(cols),
        row_stride(transposed ? 1 : cols),
        col_stride(transposed ? rows : 1) {}
  TensorView view() const {
    const std::vector<int64_t> shape = {experts, rows, cols};
    const std::vector<int64_t> strides = {int64_t{rows} * cols, row_stride, col_stride};
    return TensorView(data.data(), DType::kBFloat16, shape, strides);
  }
  DeviceBuffer<bf16> data;
  int experts, rows, cols;
  int64_t row_stride, col_stride;
};

struct Strided {
  const bf16* data;
  int64_t expert, row, col;
  __device__ float at(int64_t e, int64_t r, int64_t c) const {
    return __bfloat162float(data[e * expert + r * row + c * col]);
  }
};
Strided strided(const Weight& w) {
  return {w.data.data(), int64_t{w.rows} * w.cols, w.row_stride, w.col_stride};
}

struct Problem {
  explicit Problem(const Case& c, Fill fill)
      : c(c),
        g(is_gated(c.activation) ? 2 : 1),
        rows(make_rows(c)),
        P(rows.token.size() + 5),
        x(size_t(c.T) * c.d),
        grad_out(size_t(c.T) * c.d),
        h(P * g * c.n),
        a(P * c.n),
        y(P * c.d),
        grad_h(P * g * c.n),
        scaled_a(P * c.n),
        grad_x(P * c.d),
        b1(size_t(c.E) * g * c.n),
        b2(size_t(c.E) * c.d),
        w1(c.E, g * c.n, c.d, c.transposed),
        w2(c.E, c.d, c.n, c.transposed),
        grad_w1(c.E, g * c.n, c.d, c.transposed),
        grad_w2(c.E, c.d, c.n, c.transposed),
        float_w1(c.float_gradients ? grad_w1.data.size() : 0),
        float_w2(c.float_gradients ? grad_w2.data.size() : 0),
        partial(P * ((c.n + 127) / 128)),
        offsets(rows.offsets),
        token(rows.token),
        weight(rows.weight),
        tiles(rows.tiles),
        experts(rows.experts),
        num_tiles(std::vector<int>{int(rows.tiles.size())}) {
    fill_random(x, 1, fill);
    fill_random(grad_out, 2, fill);
    fill_random(w1.data, 3, fill);
    fill_random(w2.data, 4, fill);
    fill_random(b1, 5, fill);
    fill_random(b2, 6, fill);
    call.num_tokens = c.T;
    call.num_rows = int64_t(P);
    call.rows = {token.data(), tiles.data(), num_tiles.data(), experts.data(), claims.data()};
  }

  struct Rows {
    std::vector<int> offsets, token;
    std::vector<float> weight;
    std::vector<int4> tiles, experts;
  };
  static int rows_of(const Case& c, int e, int average) {
    constexpr int kEdges[] = {0, 1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 256};
    switch (c.skew) {
      case 1:
        return e == 1 % c.E ? average * c.E : 0;
      case 2:
        return e % 3 == 0 ? 3 * average : 0;
      case 3:
        return kEdges[e % 12];
      default:
        return std::max(0, average + int(hash(7, e) % (average / 4 + 1)) - average / 8);
    }
  }
  static Rows make_rows(const Case& c) {
    Rows r;
    const int average = int(int64_t{c.T} * c.K / c.E);
    for (int e = 0; e < c.E; ++e) {
      const int first = int(r.token.size()), count = rows_of(c, e, average);
      // Ascending distinct-ish tokens, as a stable sort by expert gives.
      std::vector<int> tokens(count);
      for (int i = 0; i < count; ++i) tokens[i] = hash(11 + e, i) % c.T;
      std::sort(tokens.begin(), tokens.end());
      r.token.insert(r.token.end(), tokens.begin(), tokens.end());
      for (int i = 0; i < count; ++i) r.weight.push_back(0.25f + (hash(13, first + i) % 64) / 64.f);
      for (int t = 0; t < count; t += 128) {
        r.tiles.push_back({first + t, count - t, e, t / 128});
      }
      r.experts.push_back({first, count, e, 0});
      r.offsets.push_back(int(r.token.size()));
    }
    std::stable_sort(r.experts.begin(), r.experts.end(),
                     [](const int4& p, const int4& q) { return p.y > q.y; });
    return r;
  }
  int64_t R() const { return int64_t(rows.token.size()); }

  Case c;
  int g;
  Rows rows;
  size_t P;
  DeviceBuffer<bf16> x, grad_out, h, a, y, grad_h, scaled_a, grad_x, b1, b2;
  Weight w1, w2, grad_w1, grad_w2;
  DeviceBuffer<float> float_w1, float_w2, partial;
  DeviceBuffer<int> offsets, token;
  DeviceBuffer<float> weight;
  DeviceBuffer<int4> tiles, experts;
  DeviceBuffer<int> num_tiles;
  DeviceBuffer<std::uint32_t> claims{std::vector<std::uint32_t>{0, 0}};
  cuda::ProductCall call;
};

// The six calls, in order.
std::vector<std::pair<const char*, std::function<void()>>> calls(Problem& p) {
  const Case& c = p.c;
  auto bias = [&](DeviceBuffer<bf16>& b, int64_t columns) {
    return c.bias ? ConstTensorView(b.data(), DType::kBFloat16, {int64_t{c.E}, columns})
                  : ConstTensorView();
  };
  auto gradient = [&](Weight& w, DeviceBuffer<float>& f) {
    if (!c.float_gradients) return w.view();
    const TensorView v = w.view();
    const std::vector<int64_t> strides = {v.stride(0), v.stride(1), v.stride(2)};
    return TensorView(f.data(), DType::kFloat32, v.shape(), strides);
  };
  const cuda::Matrix x{p.x.data(), c.d}, dout{p.grad_out.data(), c.d};
  const cuda::HiddenFunction function{c.activation, c.layout, 7.0f};
  const cuda::UpArgs up{x, p.w1.view(), bias(p.b1, p.g * c.n), function, p.h.data(), p.a.data()};
  const cuda::RowsArgs down{.a = p.a.data(),
                            .weight = p.w2.view(),
                            .bias = bias(p.b2, c.d),
                            .num_columns = c.d,
                            .out = {p.y.data(), c.d}};
  const cuda::GradHArgs grad_h{dout,
                               p.w2.view(),
                               function,
                               p.h.data(),
                               p.weight.data(),
                               p.grad_h.data(),
                               p.scaled_a.data(),
                               p.partial.data()};
  const cuda::RowsArgs grad_x{.a = p.grad_h.data(),
                              .weight = p.w1.view(),
                              .depth_dim = 1,
                              .num_columns = c.d,
                              .out = {p.grad_x.data(), c.d}};
  const cuda::WeightGradientArgs dw2{dout, p.scaled_a.data(), gradient(p.grad_w2, p.float_w2), 1,
                                     c.float_gradients};
  const cuda::WeightGradientArgs dw1{x, p.grad_h.data(), gradient(p.grad_w1, p.float_w1), 2,
                                     c.float_gradients};
  const auto product = [&p](const char* name, const auto& args) {
    const auto reason = products.reason_against(p.call, args);
    if (reason) expect(false, "declined: " + reason->argument + ", expected " + reason->expected);
    return std::pair<const char*, std::function<void()>>(
        name, [&p, args] { products.run(p.call, args); });
  };
  return {product("up", up),         product("down", down),   product("grad_h", grad_h),
          product("grad_x", grad_x), product("grad_w2", dw2), product("grad_w1", dw1)};
}

// --------------------------------------------------------------------------------------- checking

struct Reference {
  int T, d, n, E, g;
  bool interleaved;
  int64_t R;
  const bf16 *x, *grad_out, *h, *a, *y, *grad_h, *scaled_a, *grad_x, *b1, *b2;
  Strided w1, w2, grad_w1, grad_w2;
  const float *float_w1, *float_w2;  // or null
  const int *token, *offsets;
  const float* weight;
  const float* partial;
  int parts;
  cuda::ActivationParams activation;

  __device__ int expert_of(int64_t r) const {
    int e = 0;
    while (offsets[e] <= r) ++e;
    return e;
  }
  __device__ int gate(int j) const { return interleaved ? 2 * j : j; }
  __device__ int up(int j) const { return interleaved ? 2 * j + 1 : n + j; }
  __device__ double grad_a(int64_t r, int e, int j) const {
    double sum = 0;
    for (int c = 0; c < d; ++c) {
      sum += double(__bfloat162float(grad_out[int64_t{token[r]} * d + c])) * w2.at(e, c, j);
    }
    return sum;
  }
};

struct Error {  // of one output
  double difference, size;
};

__device__ float value(const bf16* p, int64_t i) { return __bfloat162float(p[i]); }

// Output `i` of operation `op`, counted over all its elements.
__device__ Error error_of(const Reference& p, int op, int64_t i) {
  double want = 0, got = 0;
  const int columns = op == 0 ? p.g * p.n : op == 2 ? p.n : p.d;
  const int64_t r = i / columns;
  const int c = int(i % columns);
  if (op == 0) {  // H, and A where c is a gate
    const int e = p.expert_of(r);
    for (int k = 0; k < p.d; ++k)
      want += double(value(p.x, int64_t{p.token[r]} * p.d + k)) * p.w1.at(e, c, k);
    if (p.b1 != nullptr) want += value(p.b1, int64_t{e} * columns + c);
    got = value(p.h, i);
    if (c < p.n) {
      const float hg = value(p.h, r * columns + (p.g == 2 ? p.gate(c) : c));
      const float act = p.g == 2 ? cuda::gated(p.activation, hg, value(p.h, r * columns + p.up(c)))
                                 : cuda::plain(p.activation, hg);
      const float stored = value(p.a, r * p.n + c);
      if (!(fabsf(stored - act) <= fabsf(act) * 0.01f + 1e-6f)) return {INFINITY, 1};
    }
  } else if (op == 1) {  // Y
    const int e = p.expert_of(r);
    for (int k = 0; k < p.n; ++k) want += double(value(p.a, r * p.n + k)) * p.w2.at(e, c, k);
    if (p.b2 != nullptr) want += value(p.b2, int64_t{e} * p.d + c);
    got = value(p.y, i);
  } else if (op == 2) {  // dH (gate and up) and A'
    const int e = p.expert_of(r);
    const float da = __bfloat162float(__float2bfloat16(float(p.grad_a(r, e, c))));
    const float s = p.weight[r];
    const int64_t row = r * p.g * p.n;
    float dg = 0, du = 0, act = 0;
    if (p.g == 2) {
      cuda::gated_gradient(p.activation, value(p.h, row + p.gate(c)), value(p.h, row + p.up(c)),
                           s * da, dg, du, act);
      const float up = value(p.grad_h, row + p.up(c));
      if (!(fabsf(up - du) <= fabsf(du) * 0.02f + fabsf(s * act) * 0.02f + 1e-3f))
        return {INFINITY, 1};
    } else {
      cuda::plain_gradient(p.activation, value(p.h, row + c), s * da, dg, act);
    }
    const float stored = value(p.scaled_a, r * p.n + c);
    if (!(fabsf(stored - s * act) <= fabsf(s * act) * 0.01f + 1e-6f)) return {INFINITY, 1};
    want = dg;
    got = value(p.grad_h, row + (p.g == 2 ? p.gate(c) : c));
  } else if (op == 3) {  // dX~
    const int e = p.expert_of(r);
    for (int k = 0; k < p.g * p.n; ++k)
      want += double(value(p.grad_h, r * p.g * p.n + k)) * p.w1.at(e, k, c);
    got = value(p.grad_x, i);
  } else {  // dW2 (op 4, [E, d, n]) and dW1 (op 5, [E, g*n, d])
    const int inner = op == 4 ? p.n : p.d, outer = op == 4 ? p.d : p.g * p.n;
    const int e = int(i / (int64_t{inner} * outer)), row = int(i / inner % outer),
              col = int(i % inner);
    const int first = e == 0 ? 0 : p.offsets[e - 1];
    for (int64_t q = first; q < p.offsets[e]; ++q) {
      const int64_t t = int64_t{p.token[q]} * p.d;
      want += op == 4 ? double(value(p.grad_out, t + row)) * value(p.scaled_a, q * p.n + col)
                      : double(value(p.grad_h, q * p.g * p.n + row)) * value(p.x, t + col);
    }
    const Strided& w = op == 4 ? p.grad_w2 : p.grad_w1;
    const float* f = op == 4 ? p.float_w2 : p.float_w1;
    got = f == nullptr ? w.at(e, row, col) : f[e * w.expert + row * w.row + col * w.col] - 1.0f;
  }
  const double difference = got - want;
  return {isfinite(got) ? difference * difference : INFINITY, want * want};
}

__global__ void check_kernel(Reference p, int op, int64_t total, int64_t samples, double* sums) {
  for (int64_t s = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; s < samples;
       s += int64_t{gridDim.x} * blockDim.x) {
    const uint64_t wide = (uint64_t{hash(21 + op, s)} << 32) | hash(31 + op, s);
    const Error e = error_of(p, op, samples == total ? s : int64_t(wide % total));
    atomicAdd(sums, e.difference);
    atomicAdd(sums + 1, e.size);
  }
}

// dS partial sums of sampled rows against fp64 over the whole row.
__global__ void check_partial_kernel(Reference p, int64_t samples, double* sums) {
  for (int64_t s = blockIdx.x; s < samples; s += gridDim.x) {
    const int64_t r = samples == p.R ? s : int64_t(hash(41, s) % p.R);
    const int e = p.expert_of(r);
    double mine = 0;
    for (int j = threadIdx.x; j < p.n; j += blockDim.x) {
      const int64_t row = r * p.g * p.n;
      const float act = p.g == 2 ? cuda::gated(p.activation, value(p.h, row + p.gate(j)),
                                               value(p.h, row + p.up(j)))
                                 : cuda::plain(p.activation, value(p.h, row + j));
      mine += p.grad_a(r, e, j) * act;
    }
    __shared__ double total;
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    atomicAdd(&total, mine);
    __syncthreads();
    if (threadIdx.x == 0) {
      double got = 0;
      for (int j = 0; j < p.parts; ++j) got += p.partial[r * p.parts + j];
      atomicAdd(sums, isfinite(got) ? (got - total) * (got - total) : INFINITY);
      atomicAdd(sums + 1, total * total);
    }
    __syncthreads();
  }
}

void poison(Problem& p) {
  for (DeviceBuffer<bf16>* b :
       {&p.h, &p.a, &p.y, &p.grad_h, &p.scaled_a, &p.grad_x, &p.grad_w1.data, &p.grad_w2.data}) {
    b->fill_bytes(0xff);
  }
  p.partial.fill_bytes(0xff);
  for (DeviceBuffer<float>* f : {&p.float_w1, &p.float_w2}) {  // accumulation starts from 1
    if (f->size() == 0) continue;
    const std::vector<float> ones(f->size(), 1.0f);
    CHECK_CUDA(cudaMemcpy(f->data(), ones.data(), f->bytes(), cudaMemcpyHostToDevice));
  }
}

// Rows past R keep their poison.
bool untouched(const DeviceBuffer<bf16>& b, int64_t from) {
  std::vector<uint16_t> tail(b.size() - from);
  CHECK_CUDA(cudaMemcpy(tail.data(), b.data() + from, tail.size() * 2, cudaMemcpyDeviceToHost));
  return std::all_of(tail.begin(), tail.end(), [](uint16_t v) { return v == 0xffff; });
}

void check(Problem& p, int64_t max_samples) {
  const Case& c = p.c;
  poison(p);
  const int block = products.partial_columns(c.n);
  const Reference ref{c.T,
                      c.d,
                      c.n,
                      c.E,
                      p.g,
                      c.layout == GateUpLayout::kInterleaved,
                      p.R(),
                      p.x.data(),
                      p.grad_out.data(),
                      p.h.data(),
                      p.a.data(),
                      p.y.data(),
                      p.grad_h.data(),
                      p.scaled_a.data(),
                      p.grad_x.data(),
                      c.bias ? p.b1.data() : nullptr,
                      c.bias ? p.b2.data() : nullptr,
                      strided(p.w1),
                      strided(p.w2),
                      strided(p.grad_w1),
                      strided(p.grad_w2),
                      c.float_gradients ? p.float_w1.data() : nullptr,
                      c.float_gradients ? p.float_w2.data() : nullptr,
                      p.token.data(),
                      p.offsets.data(),
                      p.weight.data(),
                      p.partial.data(),
                      (c.n + block - 1) / block,
                      {c.activation, 7.0f}};
  DeviceBuffer<double> sums(2);
  auto relative = [&] {
    const std::vector<double> s = sums.to_host();
    return s[1] == 0 ? s[0] : std::sqrt(s[0] / s[1]);
  };
  const auto ops = calls(p);
  for (int op = 0; op < 6; ++op) {
    ops[op].second();
    CHECK_CUDA(cudaDeviceSynchronize());
    const int64_t columns[] = {p.g * c.n, c.d, c.n, c.d};
    const int64_t total =
        op < 4 ? p.R() * columns[op] : int64_t{c.E} * c.d * c.n * (op == 5 ? p.g : 1);
    if (total == 0) continue;
    const int64_t samples = std::min(total, max_samples);
    sums.fill_bytes(0);
    check_kernel<<<1056, 128>>>(ref, op, total, samples, sums.data());
    const double error = relative();
    expect(error < (op == 2 ? 1e-2 : 3e-3),
           format("m5 %s %s: relative error %.2e", c.name, ops[op].first, error));
    if (op == 2) {
      sums.fill_bytes(0);
      check_partial_kernel<<<264, 128>>>(ref, std::min<int64_t>(p.R(), 512), sums.data());
      expect(relative() < 1e-2, format("m5 %s dS: relative error %.2e", c.name, relative()));
    }
  }
  expect(untouched(p.h, p.R() * p.g * c.n) && untouched(p.a, p.R() * c.n) &&
             untouched(p.y, p.R() * c.d) && untouched(p.grad_h, p.R() * p.g * c.n) &&
             untouched(p.scaled_a, p.R() * c.n) && untouched(p.grad_x, p.R() * c.d),
         format("m5 %s: rows past R untouched", c.name));
}

void time_case(const Case& c) {
  Problem p(c, Fill::kNormal);
  check(p, 1 << 14);
  std::vector<std::function<void()>> launches;
  const auto ops = calls(p);
  for (const auto& op : ops) launches.push_back(op.second);
  const std::vector<Timing> timings = time_interleaved(launches, 9);
  const double f = 2.0 * p.R() * c.n * c.d;
  const double factor[] = {double(p.g), 1, 1, double(p.g), 1, double(p.g)};
  double forward = 0, backward = 0;
  for (size_t i = 0; i < ops.size(); ++i) {
    (i < 2 ? forward : backward) += timings[i].median;
    Row("m5_grouped_gemm", ops[i].first)
        .text("shape", c.name)
        .timing(timings[i])
        .number("tflops", factor[i] * f / timings[i].median * 1e-9)
        .print();
  }
  Row("m5_grouped_gemm", "sum of the GEMMs")
      .text("shape", c.name)
      .number("forward_ms", forward)
      .number("backward_ms", backward)
      .number("forward_tflops", (p.g + 1) * f / forward * 1e-9)
      .number("backward_tflops", 2 * (p.g + 1) * f / backward * 1e-9)
      .print();
}

__global__ void scale_kernel(bf16* values, size_t count, float factor) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    values[i] = __float2bfloat16(factor * __bfloat162float(values[i]));
  }
}

void scale(DeviceBuffer<bf16>& values, double factor) {
  scale_kernel<<<1056, 256>>>(values.data(), values.size(), float(factor));
  CHECK_CUDA(cudaGetLastError());
}

void power_case(const Case& c, const Nvml& nvml, const Cublas& cublas) {
  constexpr double kSettle = 1.5, kSeconds = 1.5;
  const int average = int(int64_t{c.T} * c.K / c.E);
  {
    Problem p(c, Fill::kNormal);
    const double f = 2.0 * p.R() * c.n * c.d;
    const double factor[] = {double(p.g), 1, 1, double(p.g), 1, double(p.g)};
    const auto ops = calls(p);
    // As in a layer: H of deviation 1, so that the activation is not saturated. What bits toggle
    // is part of the power.
    scale(p.w1.data, 1 / std::sqrt(c.d));
    scale(p.w2.data, 1 / std::sqrt(c.n));
    for (int i : {0, 2}) ops[i].second();  // H, A, dH and A', which the others read
    for (size_t i = 0; i < ops.size(); ++i) {
      print_power("m5_power", ops[i].first, c.name,
                  measure_power(nvml, ops[i].second, kSettle, kSeconds), factor[i] * f);
    }
  }
  if (!cublas.available()) return;
  const struct {
    const char* name;
    BmmSize size;
    Major a, b;
  } dense[] = {{"cuBLAS, as up", {"", c.E, average, 2 * c.n, c.d, c.E}, Major::kK, Major::kK},
               {"cuBLAS, as dX~", {"", c.E, average, c.d, 2 * c.n, c.E}, Major::kK, Major::kMn},
               {"cuBLAS, as dW1", {"", c.E, c.d, 2 * c.n, average, c.E}, Major::kMn, Major::kMn}};
  for (const auto& one : dense) {
    const BmmProblem problem(one.size, Fill::kNormal);
    const auto launch = [&] { cublas.multiply(problem, one.a, one.b); };
    print_power("m5_power", one.name, c.name, measure_power(nvml, launch, kSettle, kSeconds),
                one.size.flops());
  }
}

}  // namespace

int main(int argc, char** argv) {
  using A = Activation;
  using L = GateUpLayout;
  const Case small[] = {
      {"small", 512, 256, 128, 8, 2},
      {"edges", 512, 320, 192, 12, 2, A::kSwiGLU, L::kConcatenated, false, false, false, 3},
      {"odd widths", 384, 200, 72, 12, 3, A::kGeGLU, L::kConcatenated, false, true, false, 3},
      {"interleaved", 512, 256, 136, 6, 2, A::kSwiGLUClamped, L::kInterleaved, false, true, true},
      {"transposed", 512, 264, 320, 6, 2, A::kSwiGLU, L::kInterleaved, true, true, false},
      {"transposed concatenated", 300, 136, 384, 7, 2, A::kReGLU, L::kConcatenated, true, false,
       true, 2},
      {"one expert", 640, 128, 256, 5, 1, A::kSwiGLU, L::kConcatenated, false, false, false, 1},
      {"ungated", 512, 256, 520, 6, 2, A::kReLUSquared, L::kConcatenated, false, true, false, 3},
      {"ungated narrow", 256, 64, 64, 6, 2, A::kSiLU, L::kConcatenated, true, false, true, 3},
      {"eight wide", 100, 8, 8, 3, 2, A::kSwiGLU, L::kConcatenated, false, false, false},
  };
  // No argument: everything. "checks": the small cases alone (for the sanitizer). "power", perhaps
  // with a case: above. Else the name of the one case to time.
  const std::string only = argc > 1 ? argv[1] : "";
  if (only.empty() || only == "checks") {
    for (const Case& c : small) {
      Problem p(c, Fill::kNormal);
      check(p, 1 << 24);
    }
  }
  const Case timed[] = {
      {"7B-n256", 24576, 1536, 256, 128, 8},     {"30B-n256", 32768, 4096, 256, 256, 16},
      {"30B-n1024", 32768, 4096, 1024, 64, 4},   {"120B-n2048", 32768, 4096, 2048, 64, 4},
      {"Qwen3-Next", 32768, 2048, 512, 512, 10}, {"1.4B-n256", 40960, 768, 256, 128, 8},
  };
  if (only == "power") {
    const Nvml nvml;
    const Cublas cublas;
    int cases = 0;
    for (const Case& c : timed) {
      if (argc >= 3 && std::string(argv[2]) != c.name) continue;
      ++cases;
      if (nvml.available()) power_case(c, nvml, cublas);
    }
    expect(nvml.available() && cases > 0, format("m5 power: %d cases", cases));
    return finish();
  }
  for (const Case& c : timed) {
    if (only.empty() || only == c.name) time_case(c);
  }
  return finish();
}
