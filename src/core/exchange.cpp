#include "core/exchange.hpp"

#include <cstdio>

namespace sonicmoe {
namespace {

std::string name_of(ExchangeOperation operation) {
  switch (operation) {
    case ExchangeOperation::kForward:
      return "forward";
    case ExchangeOperation::kBackward:
      return "backward";
    case ExchangeOperation::kBackwardKept:
      return "backward with kept rows";
  }
  return "unknown operation";
}

std::string describe(std::uint64_t word) {
  const ExchangeFlag flag = unpacked(word);
  return "call " + std::to_string(flag.call) + " (" + name_of(flag.operation) + ", " +
         std::to_string(flag.num_tokens) + (flag.num_tokens == 1 ? " token)" : " tokens)");
}

std::string seconds(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g s", value);
  return text;
}

// FNV-1a, 64 bits.
class Digest {
 public:
  template <class Integer>
  Digest& add(Integer value) {
    const auto bits = static_cast<std::uint64_t>(value);
    for (int byte = 0; byte < 8; ++byte) {
      state_ = (state_ ^ (bits >> 8 * byte & 0xff)) * 0x100000001b3u;
    }
    return *this;
  }
  std::uint64_t value() const { return state_; }

 private:
  std::uint64_t state_ = 0xcbf29ce484222325u;
};

constexpr int kLayoutVersion = 1;  // of the buffers and the protocol

}  // namespace

const char* operation_name(ExchangeOperation operation) {
  return operation == ExchangeOperation::kForward ? "moe_exchange_forward"
                                                  : "moe_exchange_backward";
}

ExchangeParts carve_exchange(WorkspaceCarver& carver, const ExchangeShape& shape) {
  const auto places = static_cast<std::size_t>(shape.num_places());
  const auto top_k = static_cast<std::size_t>(shape.top_k);
  const std::size_t slots = static_cast<std::size_t>(shape.max_tokens) * top_k;
  const std::size_t rows =
      places * static_cast<std::size_t>(shape.hidden_size) * size_of(shape.numerics.storage);
  ExchangeParts parts{};
  parts.header = carver.take<ExchangeHeader>(1);
  parts.rows_x = carver.take_bytes(rows);
  parts.rows_g = carver.take_bytes(rows);
  parts.partial = carver.take_bytes(rows);
  parts.scores = carver.take<float>(places * top_k);
  parts.ids = carver.take<std::int32_t>(slots);
  parts.weights = carver.take<float>(slots);
  return parts;
}

ExchangeParts exchange_parts(const ExchangeShape& shape, void* buffer) {
  WorkspaceCarver carver(buffer);
  return carve_exchange(carver, shape);
}

std::uint64_t call_digest(const ExchangeShape& exchange, const MoEShape& layer,
                          const ExpertOptions& options) {
  return Digest()
      .add(kLayoutVersion)
      .add(exchange.num_ranks)
      .add(exchange.max_tokens)
      .add(exchange.hidden_size)
      .add(exchange.num_experts)
      .add(exchange.top_k)
      .add(static_cast<int>(exchange.numerics.storage))
      .add(layer.intermediate_size)
      .add(static_cast<int>(options.activation))
      .add(static_cast<int>(options.gate_up_layout))
      .add(bits_of(options.limit))
      .add(options.deterministic)
      .value();
}

std::string describe(const ExchangeFailure& failure, double timeout_seconds) {
  const std::string rank = "rank " + std::to_string(failure.rank);
  const std::string peer = "rank " + std::to_string(failure.peer);
  switch (failure.fault) {
    case ExchangeFault::kNone:
      return {};
    case ExchangeFault::kTimeout:
      return rank + " waited " + seconds(timeout_seconds) + " for " + peer + " to " +
             (failure.stage == ExchangeStage::kPublished ? "publish " : "end its part of ") +
             describe(failure.wanted) +
             (failure.seen == 0 ? "; it has made no call"
                                : "; its last was " + describe(failure.seen));
    case ExchangeFault::kOrder:
      return rank + " is in " + describe(failure.wanted) + ", " + peer + " in " +
             describe(failure.seen) + ": all ranks have to make the same calls in the same order";
    case ExchangeFault::kConfiguration:
      return rank + " and " + peer + " differ in sizes, dtype or options of " +
             describe(failure.wanted) + ": all ranks have to make the same calls";
  }
  return {};
}

}  // namespace sonicmoe
