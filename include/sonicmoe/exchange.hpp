// Expert parallelism inside one host: the experts of a layer lie on EP ranks, and every rank reads
// what it needs from the memory of the others.
//
// Symbols as in moe.hpp, and: EP num_ranks, r the own rank, s another, E the experts of all ranks,
// e = E / EP those of one; rank s has experts s*e .. s*e + e - 1. T tokens of a rank, which may
// differ between ranks and calls, T_max max_tokens.
//
// A token's row crosses to a rank once, whatever number of experts it has there. With O_s the
// forward of moe.hpp over the tokens of all ranks and the experts of rank s alone:
//   out[t] = sum over the ranks s that have an expert of t, in rank order, of O_s[t]
// in float32, rounded once; O_s[t] is rounded to the dtype of x. So dW1, dW2, db1, db2 and dS are
// bit for bit those of one process on the tokens of all ranks, one rank's after another's; out and
// dX differ from its by one rounding of each O_s[t]. The same inputs give the same bits, for a
// given EP.
//
// The library gets addresses and knows no framework. Every rank owns a buffer of exchange_bytes(),
// which all ranks can read and write: threads of one process on a CPU, memory mapped between
// processes, or GPUs joined by NVLink (CUDA IPC, symmetric memory). Nothing waits for the host.
// docs/design/exchange.md has the protocol, its memory model and why it cannot deadlock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "sonicmoe/context.hpp"
#include "sonicmoe/export.hpp"
#include "sonicmoe/moe.hpp"
#include "sonicmoe/numerics.hpp"
#include "sonicmoe/tensor.hpp"

namespace sonicmoe {

/// What all ranks of an exchange agree on.
struct ExchangeShape {
  int num_ranks = 0;             ///< EP, 1..32
  std::int64_t max_tokens = 0;   ///< T_max of each rank, >= 1
  std::int64_t hidden_size = 0;  ///< d
  std::int64_t num_experts = 0;  ///< E of all ranks, a multiple of EP
  std::int64_t top_k = 0;        ///< K; EP * T_max * K is at most 2^31 - 2
  Numerics numerics;             ///< of the dtype of x

  /// Rows that a rank has places for: the tokens of all ranks.
  std::int64_t num_places() const noexcept { return num_ranks * max_tokens; }
  /// e.
  std::int64_t experts_per_rank() const noexcept { return num_experts / num_ranks; }
  friend bool operator==(const ExchangeShape&, const ExchangeShape&) = default;
};

/// Bytes of the buffer of one rank: three times EP * T_max rows of d, EP * T_max * K float32,
/// 8 T_max K bytes of ids and weights, and a header; each part rounded up to 128.
/// Errors: sizes outside the ranges above.
SONICMOE_API std::size_t exchange_bytes(const ExchangeShape& shape);

/// How an exchange behaves on this rank.
struct ExchangeOptions {
  /// How long an operation waits for another rank before it gives up, > 0; absent: the environment
  /// variable SONICMOE_EP_TIMEOUT, else 600.
  std::optional<double> timeout_seconds = {};
};

/// How a backend moves the bytes of one rank; defined by the library alone.
class ExchangePort;

/// One rank's end of an exchange. One operation at a time; all ranks make the same calls in the
/// same order, whatever layer they are of. Layers of one width share an exchange: no operation
/// leaves anything in it that another needs.
class SONICMOE_API Exchange {
 public:
  /// `buffers` [EP]: where, in this process, the buffer of each rank lies, its own included, each
  /// exchange_bytes() long and aligned to 128. Clears the own one's header, and returns when that
  /// is done: between the last rank's constructor and the first rank's first operation lies a
  /// barrier of the caller's. The buffers outlive the exchange.
  /// Errors: a rank outside 0..EP-1, another number of buffers, an absent, shared or unaligned one,
  /// a shape or dtype that the backend does not take, a timeout that is no positive number.
  Exchange(const Context& context, const ExchangeShape& shape, int rank,
           std::span<void* const> buffers, const ExchangeOptions& options = {});
  ~Exchange();
  Exchange(Exchange&&) noexcept;
  Exchange& operator=(Exchange&&) noexcept;

  const ExchangeShape& shape() const noexcept { return shape_; }
  int rank() const noexcept { return rank_; }
  Device device() const noexcept { return device_; }

  /// Throws what ended an operation of this rank: who waited how long for whom, in which call. Such
  /// an exchange is of no more use. On a CPU the operation itself has thrown; on a GPU its outputs
  /// are NaN, and the first call that comes after it, of this function or of an operation, throws.
  void check() const;

  /// For the library's operations. Errors: this one was moved from.
  ExchangePort& port() const;

 private:
  ExchangeShape shape_;
  int rank_ = 0;
  Device device_;
  std::unique_ptr<ExchangePort> port_;
};

/// The layer that a rank runs: the tokens of all ranks, its own e experts. moe_h_bytes() and
/// moe_metadata_bytes() of it are what it keeps.
/// Errors: weights that do not fit the exchange; options as in moe.hpp.
SONICMOE_API MoEShape moe_exchange_shape(const ExchangeShape& exchange,
                                         const ExpertOptions& options,
                                         const ExpertWeights& weights);

/// Scratch of moe_exchange_forward (`inference`: without h and metadata) and of
/// moe_exchange_backward: that of moe_forward or moe_backward on `shape`, from
/// moe_exchange_shape(), and 8 EP * T_max * K bytes.
SONICMOE_API std::size_t moe_exchange_forward_workspace(const Context& context,
                                                        const ExchangeShape& exchange,
                                                        const MoEShape& shape,
                                                        bool inference = false);
SONICMOE_API std::size_t moe_exchange_backward_workspace(const Context& context,
                                                         const ExchangeShape& exchange,
                                                         const MoEShape& shape);

/// Arguments of moe_exchange_forward.
struct MoEExchangeForwardArgs {
  /// As in moe.hpp, and equal on all ranks. max_rows bounds the rows of this rank's experts, and
  /// may differ; zero_absent_tokens stays true.
  ExpertOptions options;
  ConstTensorView x;             ///< [T, d], T <= T_max, float32|bfloat16, unit stride in d
  ExpertWeights weights;         ///< of this rank's e experts, as in moe.hpp
  ConstTensorView topk_ids;      ///< [T, K] int32|int64: 0..E-1, any other a dropped slot
  ConstTensorView topk_weights;  ///< [T, K] float32|bfloat16

  TensorView out;           ///< [T, d], dtype of x, unit stride in d; every element written
  TensorView h;             ///< [C, g*n] contiguous, C = moe_exchange_shape().row_capacity(), dtype
                            ///< of x; absent in inference
  TensorView metadata;      ///< [moe_metadata_bytes()] uint8, 16-byte aligned; absent in inference
  TensorView received;      ///< [EP * T_max, d] contiguous, dtype of x, or absent: the rows of all
                            ///< ranks that have an expert here, kept for backward
  TensorView rows_dropped;  ///< [1] int32 or absent: rows that max_rows left no room for
  TensorView workspace;     ///< [moe_exchange_forward_workspace()] uint8, 64-byte aligned
};

/// out as at the top of this file. Every rank calls it.
/// Errors: as moe_forward, before anything is published; what check() throws.
SONICMOE_API void moe_exchange_forward(const Context& context, Exchange& exchange,
                                       const MoEExchangeForwardArgs& args);

/// Arguments of moe_exchange_backward.
struct MoEExchangeBackwardArgs {
  ExpertOptions options;         ///< as in forward
  ConstTensorView grad_out;      ///< dO [T, d], dtype of x, unit stride in d
  ConstTensorView x;             ///< as in forward; absent where `received` is there
  ExpertWeights weights;         ///< as in forward
  ConstTensorView topk_ids;      ///< as in forward
  ConstTensorView topk_weights;  ///< as in forward
  ConstTensorView h;             ///< from forward
  ConstTensorView metadata;      ///< from forward
  ConstTensorView received;      ///< from forward, on all ranks or none; absent: X travels again

  TensorView grad_x;                ///< dX [T, d], dtype of x, unit stride in d
  TensorView grad_routing_weights;  ///< dS [T, K] float32, contiguous
  /// As in moe.hpp, each optional, of this rank's experts.
  TensorView grad_w1, grad_b1, grad_w2, grad_b2;
  bool accumulate = false;  ///< as in moe.hpp

  TensorView workspace;  ///< [moe_exchange_backward_workspace()] uint8, 64-byte aligned
};

/// Gradients of the sum of all ranks' losses:
///   dX[t] = sum over the ranks s that have an expert of t, in rank order, of that rank's dX[t]
/// in float32, rounded once; dS of a slot from the rank of its expert, exactly 0 where the slot was
/// dropped; weight gradients over the tokens of all ranks. Every rank calls it.
/// Errors: as moe_backward, before anything is published; what check() throws.
SONICMOE_API void moe_exchange_backward(const Context& context, Exchange& exchange,
                                        const MoEExchangeBackwardArgs& args);

}  // namespace sonicmoe
