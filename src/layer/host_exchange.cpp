#include "layer/host_exchange.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "sonicmoe/error.hpp"

namespace sonicmoe {
namespace {

using Clock = std::chrono::steady_clock;

std::atomic<void (*)(int)> pause_after_waits{nullptr};

std::int64_t id_at(const ConstTensorView& ids, std::int64_t slot) {
  return ids.dtype() == DType::kInt64 ? ids.as<std::int64_t>()[slot] : ids.as<std::int32_t>()[slot];
}

float weight_at(const ConstTensorView& weights, std::int64_t slot) {
  return weights.dtype() == DType::kBFloat16 ? static_cast<float>(weights.as<bfloat16>()[slot])
                                             : weights.as<float>()[slot];
}

// A short spin, then naps: a waiting rank leaves its core to the others.
class Patience {
 public:
  explicit Patience(double seconds)
      : end_(Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                std::chrono::duration<double>(std::min(seconds, 1e9)))) {}
  bool over() const { return Clock::now() >= end_; }
  void wait() {
    if (++tries_ < 64) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }

 private:
  Clock::time_point end_;
  int tries_ = 0;
};

class HostExchange final : public ExchangePort {
 public:
  HostExchange(const ExchangeShape& shape, int rank, std::span<void* const> buffers,
               double timeout_seconds)
      : shape_(shape), places_(exchange_places(shape)), rank_(rank), timeout_(timeout_seconds) {
    for (void* buffer : buffers) peers_.push_back(exchange_parts(shape, buffer));
    *parts().header = {};
  }

  const ExchangeParts& parts() const override { return peers_[static_cast<std::size_t>(rank_)]; }

  void check(const std::string& operation) const override {
    if (failure_.fault == ExchangeFault::kNone) return;
    throw Error(operation + ": " + describe(failure_, timeout_));
  }

  void publish(const Context&, const Publication& p) override {
    num_tokens_ = p.num_tokens;
    for (std::int64_t t = 0; t < p.num_tokens; ++t) {
      const std::int64_t place = places_.of(rank_, t);
      if (p.x.defined()) std::memcpy(row(parts().rows_x, place), row_of(p.x, t), row_bytes());
      if (p.grad_out.defined()) {
        std::memcpy(row(parts().rows_g, place), row_of(p.grad_out, t), row_bytes());
      }
    }
    const std::int64_t slots = p.num_tokens * shape_.top_k;
    for (std::int64_t i = 0; i < slots; ++i) {
      const std::int64_t id = id_at(p.topk_ids, i);
      const bool valid = id >= 0 && id < shape_.num_experts;
      parts().ids[i] = valid ? static_cast<std::int32_t>(id) : -1;
      parts().weights[i] = weight_at(p.topk_weights, i);
    }
    std::fill(parts().ids + slots, parts().ids + shape_.max_tokens * shape_.top_k, -1);
    ++parts().header->call;
  }

  void meet(const Context&, const Publication& p, ExchangeStage stage) override {
    const std::uint64_t own =
        packed({parts().header->call, p.operation, static_cast<std::uint32_t>(p.num_tokens)});
    for (const ExchangeParts& peer : peers_) {
      if (stage == ExchangeStage::kPublished) {
        std::atomic_ref(peer.header->digest[rank_]).store(p.digest, std::memory_order_relaxed);
      }
      std::atomic_ref(flags(peer, stage)[rank_]).store(own, std::memory_order_release);
    }
    Patience patience(timeout_);
    for (int peer = 0; peer < shape_.num_ranks; ++peer) await(peer, own, p.digest, stage, patience);
    if (auto* pause = pause_after_waits.load(std::memory_order_relaxed)) pause(rank_);
  }

  void collect(const Context&, const Collection& c) override {
    for (int s = 0; s < shape_.num_ranks; ++s) {
      const ExchangeParts& peer = peers_[static_cast<std::size_t>(s)];
      for (std::int64_t t = 0; t < shape_.max_tokens; ++t) {
        const std::int64_t place = places_.of(s, t), first = t * shape_.top_k;
        const std::int32_t* ids = peer.ids + first;
        std::copy_n(ids, shape_.top_k, c.ids + place * shape_.top_k);
        if (std::all_of(ids, ids + shape_.top_k, [](std::int32_t id) { return id < 0; })) {
          std::fill_n(c.weights + place * shape_.top_k, shape_.top_k, 0.0f);
          continue;
        }
        std::copy_n(peer.weights + first, shape_.top_k, c.weights + place * shape_.top_k);
        if (!has_expert_of(rank_, ids)) continue;
        copy_row(c.x, peer.rows_x, place);
        copy_row(c.grad_out, peer.rows_g, place);
      }
    }
  }

  void sum(const Context&, TensorView out, float* scores) override {
    std::vector<float> row(static_cast<std::size_t>(shape_.hidden_size));
    for (std::int64_t t = 0; t < num_tokens_; ++t) {
      const std::int32_t* ids = parts().ids + t * shape_.top_k;
      const std::int64_t place = places_.of(rank_, t);
      std::fill(row.begin(), row.end(), 0.0f);
      for (int s = 0; s < shape_.num_ranks; ++s) {
        if (has_expert_of(s, ids)) add_partial(s, place, row);
      }
      store_row(out, t, row);
      if (scores == nullptr) continue;
      for (std::int64_t k = 0; k < shape_.top_k; ++k) {
        const auto owner = static_cast<std::size_t>(ids[k] / shape_.experts_per_rank());
        scores[t * shape_.top_k + k] =
            ids[k] < 0 ? 0.0f : peers_[owner].scores[place * shape_.top_k + k];
      }
    }
  }

 private:
  std::size_t row_bytes() const {
    return static_cast<std::size_t>(shape_.hidden_size) * size_of(shape_.numerics.storage);
  }
  std::byte* row(void* rows, std::int64_t place) const {
    return static_cast<std::byte*>(rows) + static_cast<std::size_t>(place) * row_bytes();
  }
  static const std::byte* row_of(const ConstTensorView& view, std::int64_t t) {
    return view.as<std::byte>() +
           t * view.stride(0) * static_cast<std::int64_t>(size_of(view.dtype()));
  }
  static std::uint64_t* flags(const ExchangeParts& parts, ExchangeStage stage) {
    return stage == ExchangeStage::kPublished ? parts.header->published : parts.header->ready;
  }

  void await(int peer, std::uint64_t own, std::uint64_t digest, ExchangeStage stage,
             Patience& patience) {
    const std::atomic_ref word(flags(parts(), stage)[peer]);
    const ExchangeFlag wanted = unpacked(own);
    std::uint64_t seen = word.load(std::memory_order_acquire);
    while (!reached(unpacked(seen).call, wanted.call)) {
      if (patience.over()) fail({ExchangeFault::kTimeout, rank_, peer, stage, own, seen});
      patience.wait();
      seen = word.load(std::memory_order_acquire);
    }
    const ExchangeFlag flag = unpacked(seen);
    if (flag.call != wanted.call || flag.operation != wanted.operation) {
      fail({ExchangeFault::kOrder, rank_, peer, stage, own, seen});
    }
    // Past this stage the peer may have gone on to its next call, whose digest may be another.
    if (stage != ExchangeStage::kPublished) return;
    if (std::atomic_ref(parts().header->digest[peer]).load(std::memory_order_relaxed) != digest) {
      fail({ExchangeFault::kConfiguration, rank_, peer, stage, own, seen});
    }
  }
  void fail(const ExchangeFailure& failure) {
    failure_ = failure;
    parts().header->failed = 1;
    check(operation_name(unpacked(failure.wanted).operation));
  }

  bool has_expert_of(int rank, const std::int32_t* ids) const {
    const std::int64_t e = shape_.experts_per_rank();
    return std::any_of(ids, ids + shape_.top_k,
                       [&](std::int32_t id) { return id >= 0 && id / e == rank; });
  }
  void copy_row(void* to, void* from, std::int64_t place) const {
    if (to != nullptr && to != from) std::memcpy(row(to, place), row(from, place), row_bytes());
  }
  void add_partial(int rank, std::int64_t place, std::vector<float>& sum) const {
    const std::byte* from = row(peers_[static_cast<std::size_t>(rank)].partial, place);
    for (std::size_t c = 0; c < sum.size(); ++c) {
      sum[c] += shape_.numerics.storage == DType::kBFloat16
                    ? static_cast<float>(reinterpret_cast<const bfloat16*>(from)[c])
                    : reinterpret_cast<const float*>(from)[c];
    }
  }
  static void store_row(const TensorView& out, std::int64_t t, const std::vector<float>& row) {
    if (out.dtype() == DType::kFloat32) {
      std::copy(row.begin(), row.end(), out.as<float>() + t * out.stride(0));
    } else {
      std::transform(row.begin(), row.end(), out.as<bfloat16>() + t * out.stride(0),
                     [](float value) { return bfloat16(value); });
    }
  }

  ExchangeShape shape_;
  ExchangePlaces places_;
  int rank_;
  double timeout_;
  std::vector<ExchangeParts> peers_;
  std::int64_t num_tokens_ = 0;  // of the call that runs
  ExchangeFailure failure_;
};

}  // namespace

std::unique_ptr<ExchangePort> make_host_exchange(const ExchangeShape& shape, int rank,
                                                 std::span<void* const> buffers,
                                                 double timeout_seconds) {
  return std::make_unique<HostExchange>(shape, rank, buffers, timeout_seconds);
}

void set_pause_after_waits(void (*pause)(int rank)) {
  pause_after_waits.store(pause, std::memory_order_relaxed);
}

}  // namespace sonicmoe
