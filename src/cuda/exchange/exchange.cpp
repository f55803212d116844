#include "cuda/exchange/exchange.hpp"

#include <algorithm>
#include <atomic>

#include "cuda/device.hpp"
#include "cuda/element.hpp"
#include "cuda/exchange/kernels.hpp"
#include "cuda/launch_check.hpp"
#include "cuda/range.hpp"

namespace sonicmoe::cuda {
namespace {

cudaStream_t stream_of(const Context& context) {
  return static_cast<cudaStream_t>(context.stream.handle);
}

StridedRows rows_of(const ConstTensorView& view) {
  if (!view.defined() || view.numel() == 0) return {};
  return {const_cast<void*>(view.data()), view.stride(0) * kElementBytes};
}

/// A record that the host reads while kernels may write it.
class HostRecord {
 public:
  HostRecord() {
    check_cuda(
        cudaHostAlloc(&data_, sizeof(ExchangeFailure), cudaHostAllocMapped | cudaHostAllocPortable),
        "exchange: record of failures");
    *host() = {};
  }
  ~HostRecord() { (void)cudaFreeHost(data_); }
  HostRecord(const HostRecord&) = delete;
  HostRecord& operator=(const HostRecord&) = delete;

  ExchangeFailure* host() const { return static_cast<ExchangeFailure*>(data_); }
  ExchangeFailure* device() const {
    void* address = nullptr;
    check_cuda(cudaHostGetDevicePointer(&address, data_, 0), "exchange: record of failures");
    return static_cast<ExchangeFailure*>(address);
  }
  bool is_filled() const {
    return std::atomic_ref(host()->fault).load(std::memory_order_acquire) != ExchangeFault::kNone;
  }

 private:
  void* data_ = nullptr;
};

class CudaExchange final : public ExchangePort {
 public:
  CudaExchange(const Context& context, const ExchangeShape& shape, int rank,
               std::span<void* const> buffers, double timeout_seconds)
      : timeout_(timeout_seconds), device_record_(record_.device()) {
    for (std::size_t s = 0; s < buffers.size(); ++s) {
      peers_.buffers[s] = static_cast<std::byte*>(buffers[s]);
    }
    peers_.own = exchange_parts(shape, buffers[static_cast<std::size_t>(rank)]);
    peers_.places = exchange_places(shape);
    peers_.max_tokens = shape.max_tokens;
    peers_.row_bytes = shape.hidden_size * kElementBytes;
    peers_.rank = rank;
    peers_.num_ranks = shape.num_ranks;
    peers_.top_k = static_cast<int>(shape.top_k);
    peers_.num_experts = static_cast<int>(shape.num_experts);
    peers_.experts_per_rank = static_cast<int>(shape.experts_per_rank());
    const cudaStream_t stream = stream_of(context);
    check_cuda(cudaMemsetAsync(peers_.own.header, 0, sizeof(ExchangeHeader), stream),
               "exchange: header");
    check_cuda(cudaStreamSynchronize(stream), "exchange: header");
  }

  const ExchangeParts& parts() const override { return peers_.own; }

  void check(const std::string& operation) const override {
    if (record_.is_filled()) throw Error(operation + ": " + describe(*record_.host(), timeout_));
  }

  std::optional<Objection> reason_against(const char* argument,
                                          const ConstTensorView& view) const override {
    if (view.numel() == 0) return {};
    const auto address = reinterpret_cast<std::uintptr_t>(view.data());
    if (address % 16 == 0 && view.stride(0) % kVectorElements == 0) return {};
    return Objection{argument, "rows that start at multiples of 16 bytes on a GPU",
                     view.describe() + " at " + std::to_string(address) + ", row stride " +
                         std::to_string(view.stride(0))};
  }

  void publish(const Context& context, const Publication& p) override {
    const DeviceGuard guard(context.device.index);
    const Range range("publish");
    num_tokens_ = p.num_tokens;
    check_cuda(cuda::publish(stream_of(context), peers_,
                             {.num_tokens = p.num_tokens,
                              .x = rows_of(p.x),
                              .grad_out = rows_of(p.grad_out),
                              .ids = p.topk_ids.data(),
                              .weights = p.topk_weights.data(),
                              .wide_ids = p.topk_ids.dtype() == DType::kInt64,
                              .bf16_weights = p.topk_weights.dtype() == DType::kBFloat16}),
               "publish");
  }

  void meet(const Context& context, const Publication& p, ExchangeStage stage) override {
    const DeviceGuard guard(context.device.index);
    const Range range("gate");
    const double nanoseconds = std::min(timeout_ * 1e9, 1e18);
    check_cuda(cuda::meet(stream_of(context), peers_,
                          {.stage = stage,
                           .operation = p.operation,
                           .num_tokens = static_cast<std::uint32_t>(p.num_tokens),
                           .digest = p.digest,
                           .timeout_nanoseconds = static_cast<std::uint64_t>(nanoseconds),
                           .record = device_record_}),
               "gate");
  }

  void collect(const Context& context, const Collection& collection) override {
    const DeviceGuard guard(context.device.index);
    const Range range("pull");
    check_cuda(pull(stream_of(context), peers_, collection), "pull");
  }

  void sum(const Context& context, TensorView out, float* scores) override {
    const DeviceGuard guard(context.device.index);
    const Range range("pull_sum");
    check_cuda(pull_sum(stream_of(context), peers_, num_tokens_, rows_of(out), scores), "pull_sum");
  }

 private:
  HostRecord record_;
  double timeout_;
  ExchangeFailure* device_record_;
  ExchangePeers peers_{};
  std::int64_t num_tokens_ = 0;  // of the call that runs
};

}  // namespace

std::unique_ptr<ExchangePort> make_exchange(const Check& check, const Context& context,
                                            const ExchangeShape& shape, int rank,
                                            std::span<void* const> buffers,
                                            double timeout_seconds) {
  check.that(shape.numerics == Numerics::of(DType::kBFloat16), "numerics", "bfloat16 on a GPU",
             to_string(shape.numerics));
  check.that(shape.hidden_size % kVectorElements == 0, "hidden_size",
             "a multiple of " + std::to_string(kVectorElements) + " on a GPU",
             std::to_string(shape.hidden_size));
  const DeviceGuard guard(context.device.index);
  return std::make_unique<CudaExchange>(context, shape, rank, buffers, timeout_seconds);
}

}  // namespace sonicmoe::cuda
